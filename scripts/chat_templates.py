"""Calls that real chat templates write, read back by our response templates.

    PYTHONPATH=tests python scripts/chat_templates.py FOLDER   # of *.jinja: models/templates of llama.cpp, say

For each chat template: which of our response templates reads its model, and whether the calls of an assistant's message
that it renders are read back as the same calls. A chat template renders what was said before, and its model was
trained to write the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from paged_core import InvalidRequestError, TextCodec
from paged_serving.conversation.events import Answer
from paged_serving.conversation.rendering import render
from paged_serving.conversation.turns import Conversation, Tool, ToolCall, Turn
from paged_serving.response_templates.parser import TemplateParser
from paged_serving.response_templates.selection import of_model
from paged_serving.response_templates.template import ResponseTemplate
from tiny_folder import byte_tokenizer

_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "array"}},
    "required": ["city"],
}
_SUM = {
    "type": "object",
    "properties": {"a": {"type": "number"}, "b": {"type": "number"}, "round": {"type": "boolean"}},
}
_TOOLS = (Tool("get_weather", "The weather", _WEATHER), Tool("add", "The sum", _SUM))
_CALLS = (
    ToolCall("abcdefghi", "get_weather", '{"city": "Saint-Étienne \\"42\\"", "days": 2, "units": ["°C", "mm"]}'),
    ToolCall("bcdefghij", "add", '{"a": 1, "b": -2.5, "round": true}'),
)


def main() -> int:
    counts = {"read back": 0, "differs": 0, "not rendered": 0, "no response template": 0}
    for path in sorted(Path(sys.argv[1]).rglob("*.jinja")):
        told, why = trial(path.read_text(encoding="utf-8"))
        counts[told.partition(":")[0]] += 1
        print(f"{path.stem}: {told}{f' ({why})' if why else ''}", flush=True)
    print(counts)
    return 1 if counts["differs"] else 0


def trial(source: str) -> tuple[str, str]:
    """What came of one chat template, and more of it."""
    template = of_model(None, source)
    if template is None or template.calls is None:
        return "no response template", ""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = source
    codec = TextCodec(tokenizer)
    refusal = ""
    for calls in (_CALLS, _CALLS[:1]):  # some models make one at a time
        try:
            prompt, written = _written(codec, calls)
        except InvalidRequestError as error:
            refusal = refusal or str(error)[:100]
            continue
        found = _read(template, prompt, written)
        wanted = [(call.name, json.loads(call.arguments)) for call in calls]
        said = f"{len(calls)} by {template.name}"
        if found and found == wanted[: len(found)]:  # some write the first of several only
            return f"read back: {len(found)} of {said}", ""
        return f"differs: {said}", f"{written!r} -> {found}"
    return "not rendered", f"{template.name}: {refusal}"


def _written(codec: TextCodec, calls: Sequence[ToolCall]) -> tuple[str, str]:
    """A prompt, and what the assistant says after it."""
    asked = Turn("user", "How is the weather?")
    answered = [Turn("tool", "sunny", name=call.name, tool_call_id=call.id) for call in calls]
    turns = [asked, Turn("assistant", None, tool_calls=calls), *answered]
    whole = render(codec, Conversation(turns, _TOOLS, opens_answer=False))
    prompt = render(codec, Conversation([asked], _TOOLS))
    closed = render(codec, Conversation([asked], _TOOLS, opens_answer=False))
    opened = prompt[len(closed) :]  # by which the assistant begins to speak
    common = next((end for end in range(len(opened), -1, -1) if whole.startswith(closed + opened[:end])), None)
    if common is None:
        raise InvalidRequestError("it writes the question otherwise once it was answered")
    after = whole[len(closed) + common :]
    ends = [place for end in ("<eos>", "sunny") if (place := after.find(end)) >= 0]
    return closed + opened[:common], after[: min(ends, default=len(after))]


def _read(template: ResponseTemplate, prompt: str, written: str) -> list[tuple[str, object]]:
    parser = TemplateParser(template, prompt, tools=_TOOLS)
    answer = Answer().add(parser.feed(written)).add(parser.finish(cut=False))
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


if __name__ == "__main__":
    sys.exit(main())

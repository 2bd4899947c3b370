"""The input items of POST /v1/responses, and their turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from paged_serving.conversation.turns import ToolCall, Turn
from paged_serving.protocol.bodies import Body, Ignored, must
from paged_serving.protocol.parsing import refuse, refuse_unless_object

_TEXT_ONLY = "a string or a list of text parts; this server reads text only"


class Part(Body, frozen=True):
    type: Annotated[
        Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"],
        must('"input_text" or "output_text": this server reads text only'),
    ]
    text: str = ""
    refusal: str = ""
    annotations: Ignored = None
    logprobs: Ignored = None


_Content = Annotated[str | list[Part], must(_TEXT_ONLY)]


class Item(Body, frozen=True):
    """A message, a call of the assistant's, a tool's answer to one, or what the assistant thought before.
    A reference stands for one of these that a response has told."""

    type: Annotated[
        Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"],
        must('"message", "function_call", "function_call_output", "reasoning" or "item_reference"'),
    ] = "message"
    role: str | None = None
    content: _Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = "{}"
    output: _Content | None = None
    id: Ignored = None  # but of a reference
    status: Ignored = None
    phase: Ignored = None
    summary: Ignored = None
    encrypted_content: Ignored = None


def without_references(items: Sequence[Item], find: Callable[[str, str], Mapping[str, Any]]) -> list[Item]:
    """``find``: (an item's id, the field that has it) to the item, as a response told it.

    Raises:
        ProtocolError: there is no such item.
    """
    found = []
    for place, item in enumerate(items):
        if item.type == "item_reference" or (item.type == "message" and item.role is None and item.id is not None):
            path = f"input[{place}].id"
            if not isinstance(item.id, str):
                refuse(path, "is missing; it must be that of an item which a response has told")
            item = msgspec.convert(find(item.id, path), Item)
        found.append(item)
    return found


def turns_of(items: Sequence[Item]) -> Iterator[Turn]:
    """Calls, and what was thought and said before them, are one turn of the assistant's."""
    said: list[Item] = []
    for place, item in enumerate(items):
        path = f"input[{place}]"
        if item.type == "function_call":
            _check_call(item, path)
            said.append(item)
        elif item.type == "reasoning" or (item.type == "message" and item.role == "assistant"):
            if item.type == "message" and any(each.type != "reasoning" for each in said):
                yield _assistant(said)
                said = []
            said.append(item)
        else:
            if said:
                yield _assistant(said)
                said = []
            yield _told(item, path)
    if said:
        yield _assistant(said)


def _assistant(items: Sequence[Item]) -> Turn:
    texts = {
        kind: "".join(_text(each.content) for each in items if each.type == kind) for kind in ("message", "reasoning")
    }
    calls = [
        ToolCall(each.call_id or "", each.name or "", each.arguments) for each in items if each.type == "function_call"
    ]
    content = texts["message"] if texts["message"] or not calls else None
    return Turn("assistant", content, reasoning=texts["reasoning"] or None, tool_calls=calls)


def _told(item: Item, path: str) -> Turn:
    if item.type == "function_call_output":
        if item.call_id is None:
            refuse(f"{path}.call_id", "is missing; it must be a call's")
        if item.output is None:
            refuse(f"{path}.output", f"is missing; it must be {_TEXT_ONLY}")
        return Turn("tool", _text(item.output), tool_call_id=item.call_id)
    if item.role is None:
        refuse(f"{path}.role", "is missing; it must be a string")
    if item.content is None:
        refuse(f"{path}.content", f"is missing; it must be {_TEXT_ONLY}")
    content = item.content
    return Turn(item.role, content if isinstance(content, str) else [part.text or part.refusal for part in content])


def _check_call(item: Item, path: str) -> None:
    if item.name is None:
        refuse(f"{path}.name", "is missing; it must be a string")
    refuse_unless_object(f"{path}.arguments", item.arguments)


def _text(content: str | Sequence[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal for part in content)

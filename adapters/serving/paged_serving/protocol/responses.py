"""POST /v1/responses: one body in, OpenAI's events out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from paged_core import GenerationOutput, StreamDelta
from paged_serving.conversation.blocks import ContentBlock, ContentNews
from paged_serving.conversation.turns import ToolCall, Turn
from paged_serving.protocol.answering import ConversationAnswer, num_cached
from paged_serving.protocol.bodies import listed
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.response_store import ResponseStore, item_id
from paged_serving.protocol.responses_body import (
    ResponsesBody,
    check_include,
    input_turns,
    structure_of,
    to_conversation,
)
from paged_serving.protocol.responses_input import without_references
from paged_serving.protocol.sampling_body import SAMPLED
from paged_serving.protocol.served import ServedModel, sampling_params
from paged_serving.protocol.talk import Fields

_FIELDS = Fields(turns="input", schema="tools[{}].parameters", effort="reasoning.effort")
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
_NAMES = {"max_tokens": "max_output_tokens", "prompt": "input"}


class ResponsesCall:
    """One call under way; see protocol.call for its members. Its chunks are events, each with its ``type``.

    Raises:
        ProtocolError: the body asks for something that can't be had, or the chat template refuses it.
    """

    def __init__(self, body: Any, served: ServedModel, request_id: str, *, store: ResponseStore) -> None:
        asked = _with_items(read_body(ResponsesBody, body, served), store)
        check_include(asked)
        self.id = f"resp_{uuid.uuid4().hex}"  # not chosen by a client, because whoever knows it may continue it
        self._asked, self._model = asked, served.check_name(asked.model)
        earlier = () if asked.previous_response_id is None else store.turns(asked.previous_response_id)
        self._turns = [*earlier, *input_turns(asked)]
        self._store = store if asked.store else None
        most = served.default_max_tokens(None) if asked.max_output_tokens is None else asked.max_output_tokens
        sampled = {name: getattr(asked, name) for name in SAMPLED}
        params = sampling_params(_NAMES, max_tokens=most, stop=listed(asked.stop), **sampled)
        conversation = to_conversation(asked, earlier)
        self._answering = ConversationAnswer(conversation, served, params, structure_of(asked), _FIELDS, _NAMES)
        self.prompts, self.params, self.grammar = (
            self._answering.prompts, self._answering.params, self._answering.grammar,
        )  # fmt: skip
        self.stream = asked.stream
        self.retells, self.named = True, _NAMES
        self._created = int(time.time())
        self._num_events = 0

    def first_chunks(self) -> list[dict[str, Any]]:
        begun = self._response("in_progress", [])
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        return [event for news in self._answering.feed(delta) for event in self._events(news)]

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[dict[str, Any]]:
        response = self._ended(results)
        return [self._event(f"response.{response['status']}", response=response)]

    def answer(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        self._answering.read_whole(results)
        return self._ended(results)

    # ---- events --------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _events(self, news: ContentNews) -> Iterator[dict[str, Any]]:
        block = news.block
        at = {"item_id": self._item_id(block), "output_index": block.index}
        if news.what == "grown":
            kind, place = _GROWN[block.kind]
            more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            yield self._event(f"{kind}.delta", **at, **place, delta=news.text, **more)
        elif news.what == "opened":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "call":
                part = _part(block, "")
                yield self._event("response.content_part.added", **at, content_index=0, part=part)
        else:
            yield from self._closing(block, at)

    def _closing(self, block: ContentBlock, at: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind, place = _GROWN[block.kind]
        if block.kind == "call":
            yield self._event(f"{kind}.done", **at, arguments=block.text, name=block.name)
        else:
            more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            yield self._event(f"{kind}.done", **at, **place, text=block.text, **more)
            part = _part(block, block.text)
            yield self._event("response.content_part.done", **at, content_index=0, part=part)
        item = self._item(block, _ended_as(block))
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    # ---- objects -------------------------------------------------------------------------------------------------

    def _item_id(self, block: ContentBlock) -> str:
        return item_id(_PREFIXES[block.kind], self.id, block.index)

    def _item(self, block: ContentBlock, status: str) -> dict[str, Any]:
        begun = status == "in_progress"
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            arguments = "" if begun else block.text
            return {
                **item,
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": arguments,
            }
        content = [] if begun else [_part(block, block.text)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _ended(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        blocks, finish = self._answering.blocks.all, self._answering.blocks.finish
        assert finish is not None, "it has ended"
        cut = finish.reason == "length"
        items = [self._item(block, _ended_as(block)) for block in blocks]
        response = self._response("incomplete" if cut else "completed", items)
        num_prompt = len(self.prompts[0].token_ids)
        response["usage"] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": num_cached(results), "cache_write_tokens": 0},
            "output_tokens": finish.num_tokens,
            "output_tokens_details": {"reasoning_tokens": self._answering.num_reasoning_tokens()},
            "total_tokens": num_prompt + finish.num_tokens,
        }
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self._store is not None:
            self._store.put(self.id, [*self._turns, _turn(blocks)], response)
        return response

    def _response(self, status: str, output: list[Any]) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": asked.store,
            "temperature": self.params.temperature,
            "text": {"format": _told_format(asked)},
            "tool_choice": _told_choice(asked),
            "tools": [_told_tool(each) for each in asked.tools],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": None,
        }


_GROWN: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("response.output_text", {"content_index": 0}),
    "reasoning": ("response.reasoning_text", {"content_index": 0}),
    "call": ("response.function_call_arguments", {}),
}


def _with_items(asked: ResponsesBody, store: ResponseStore) -> ResponsesBody:
    """With the items themselves in place of references to them."""
    if isinstance(asked.input, str):
        return asked
    return msgspec.structs.replace(asked, input=without_references(asked.input, store.item))


def _ended_as(block: ContentBlock) -> str:
    return "incomplete" if block.cut else "completed"


def _part(block: ContentBlock, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _turn(blocks: Sequence[ContentBlock]) -> Turn:
    """The answer, for those that go on from it."""
    texts = {kind: "".join(each.text for each in blocks if each.kind == kind) for kind in ("text", "reasoning")}
    calls = [ToolCall(each.call_id, each.name, each.text) for each in blocks if each.kind == "call"]
    content = texts["text"] if texts["text"] or not calls else None
    return Turn("assistant", content, reasoning=texts["reasoning"] or None, tool_calls=calls)


def _told_tool(tool: Any) -> dict[str, Any]:
    return {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters,
            "strict": tool.strict}  # fmt: skip


def _told_choice(asked: ResponsesBody) -> Any:
    choice = asked.tool_choice
    if isinstance(choice, str):
        return choice
    if choice.type == "function":
        return {"type": "function", "name": choice.name}
    return {"type": "allowed_tools", "mode": choice.mode or "auto", "tools": choice.tools}


def _told_format(asked: ResponsesBody) -> dict[str, Any]:
    form = asked.text.format
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": form.type, "name": form.name or "answer", "schema": form.schema, "strict": form.strict}

"""POST /v1/messages: one body in, Anthropic's events out."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_core import GenerationOutput, StreamDelta
from paged_serving.conversation.blocks import ContentBlock, ContentNews
from paged_serving.protocol.answering import ConversationAnswer, num_cached
from paged_serving.protocol.anthropic_body import CountBody, MessagesBody, to_conversation
from paged_serving.protocol.bodies import listed
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.sampling_body import SAMPLED
from paged_serving.protocol.served import ServedModel, sampling_params
from paged_serving.protocol.talk import Fields, to_talk

_FIELDS = Fields(schema="tools[{}].input_schema")
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
_REASONS: Mapping[str, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesCall:
    """One call under way; see protocol.call for its members. Its chunks are events, each with its ``type``.

    Raises:
        ProtocolError: the body asks for something that can't be had, or the chat template refuses the messages.
    """

    def __init__(self, body: Any, served: ServedModel, request_id: str) -> None:
        asked = read_body(MessagesBody, body, served)
        self._model = served.check_name(asked.model)
        sampled = {name: getattr(asked, name) for name in SAMPLED}
        stop = [*asked.stop_sequences, *listed(asked.stop)]
        self.named = {"prompt": "messages"} | ({"stop": "stop_sequences"} if asked.stop_sequences else {})
        params = sampling_params(self.named, max_tokens=asked.max_tokens, stop=stop, **sampled)
        self._answering = ConversationAnswer(to_conversation(asked), served, params, None, _FIELDS, self.named)
        self.prompts, self.params, self.grammar = (
            self._answering.prompts, self._answering.params, self._answering.grammar,
        )  # fmt: skip
        self.stream = asked.stream
        self.retells = False
        self._id = f"msg_{uuid.uuid4().hex}"

    def first_chunks(self) -> list[dict[str, Any]]:
        message = self._message([], num_tokens=0, num_cached=0)
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        return [event for news in self._answering.feed(delta) for event in _events(news)]

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[dict[str, Any]]:
        ended = self._ended(results)
        delta = {name: ended[name] for name in ("stop_reason", "stop_sequence")}
        return [{"type": "message_delta", "delta": delta, "usage": ended["usage"]}, {"type": "message_stop"}]

    def answer(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        self._answering.read_whole(results)
        return self._ended(results)

    def _ended(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        finish = self._answering.blocks.finish
        assert finish is not None, "it has ended"
        content = [_whole(block) for block in self._answering.blocks.all]
        message = self._message(content, num_tokens=finish.num_tokens, num_cached=num_cached(results))
        message["stop_reason"] = _REASONS[finish.reason]
        if finish.reason == "stop" and isinstance(finish.stop_reason, str):
            message["stop_reason"], message["stop_sequence"] = "stop_sequence", finish.stop_reason
        return message

    def _message(self, content: list[Any], *, num_tokens: int, num_cached: int) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(self.prompts[0].token_ids) - num_cached,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": num_cached,
                "output_tokens": num_tokens,
            },
        }


def count_tokens(body: Any, served: ServedModel) -> dict[str, int]:
    """The answer to POST /v1/messages/count_tokens.

    Raises:
        ProtocolError: as of the call itself.
    """
    asked = read_body(CountBody, body, served)
    served.check_name(asked.model)
    return {"input_tokens": len(to_talk(to_conversation(asked), served, _FIELDS).prompt.token_ids)}


def _events(news: ContentNews) -> Iterator[dict[str, Any]]:
    block = news.block
    at = {"index": block.index}
    if news.what == "opened":
        yield {"type": "content_block_start", **at, "content_block": _begun(block)}
    elif news.what == "grown":
        kind, name = _DELTAS[block.kind]
        yield {"type": "content_block_delta", **at, "delta": {"type": kind, name: news.text}}
    else:
        yield {"type": "content_block_stop", **at}


def _begun(block: ContentBlock) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole(block: ContentBlock) -> dict[str, Any]:
    begun = _begun(block)
    if block.kind == "call":
        return {**begun, "input": json.loads(block.text or "{}")}
    return {**begun, "thinking" if block.kind == "reasoning" else "text": block.text}

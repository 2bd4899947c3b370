"""POST /v1/chat/completions: one body in, JSON or chunks out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paged_core import CompletionOutput, GenerationOutput, Prompt, SamplingParams, StreamDelta
from paged_serving.conversation.events import (
    Answer,
    ArgumentsDelta,
    Event,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallStart,
)
from paged_serving.conversation.reader import ChoiceReader
from paged_serving.conversation.turns import ToolCall
from paged_serving.protocol.chat_body import ChatBody, read_chat, to_conversation
from paged_serving.protocol.openai_body import Options, check_truncation, to_options
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.structured import openai_structure
from paged_serving.protocol.talk import Fields, Talk, to_talk
from paged_serving.protocol.usage import Usage, best

if TYPE_CHECKING:
    from paged_serving.grammars.grammars import Grammar


@dataclass(frozen=True)
class PreparedChat:
    """What a body comes to."""

    options: Options
    talk: Talk
    prompt: Prompt
    params: SamplingParams  # as the engine gets them
    grammar: Grammar | None
    num_top: int | None  # log-probabilities beside each token; None: none are told
    num_prompt_top: int | None


def to_call(body: ChatBody, served: ServedModel) -> PreparedChat:
    """
    Raises:
        ProtocolError: ``body`` asks for something that can't be had, or the chat template refuses the messages.
    """
    check_truncation(body)
    if body.top_logprobs and not body.logprobs:
        refuse("top_logprobs", "needs logprobs to be true")
    num_top = body.top_logprobs or 0 if body.logprobs else None
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    own = {"max_tokens": "max_completion_tokens"} if body.max_completion_tokens or not body.max_tokens else {}
    options = to_options(
        body,
        served,
        max_tokens=served.default_max_tokens(None) if max_tokens is None else max_tokens,
        num_top=num_top,
        prompt_logprobs=body.prompt_logprobs,
        named={"logprobs": "top_logprobs" if num_top else "logprobs", "prompt": "messages", **own},
    )
    talk = to_talk(
        to_conversation(body),
        served,
        Fields(),
        add_special_tokens=body.add_special_tokens,
        structure=openai_structure(body),
        ignore_eos=body.ignore_eos,
    )
    if talk.grammar is not None and body.use_beam_search:
        refuse("use_beam_search", "can't go with calls or a structure that must be followed; leave one of them out")
    grammar = talk.grammar or options.grammar
    prompt = served.finish_prompt("messages", talk.prompt, body.truncate_prompt_tokens)
    tells_prompt = body.return_token_ids or body.prompt_logprobs is not None
    params = served.finish_params(
        talk.adapted(options.params),
        [prompt],
        grammar,
        copies=1 if tells_prompt else 0,
        named={**options.named, "echo": "return_token_ids"},
    )
    return PreparedChat(options, talk, prompt, params, grammar, num_top, body.prompt_logprobs)


class ChatCall:
    """One call under way; see protocol.call for its members.

    ``whole_deltas``: every streamed piece names the role and the (absent) tool calls. TGI's own chat clients need it;
    OpenAI's join the pieces, and would repeat the role.

    Raises:
        ProtocolError: the body asks for something that can't be had, or the chat template refuses the messages.
    """

    def __init__(self, body: Any, served: ServedModel, request_id: str, *, whole_deltas: bool = False) -> None:
        wished = read_chat(body, served)
        prepared = to_call(wished, served)
        self.options, self.prompts, self.params = prepared.options, [prepared.prompt], prepared.params
        self.stream, self.grammar = prepared.options.stream, prepared.grammar
        self._talk, self._skips_special = prepared.talk, wished.skip_special_tokens
        self._tells_reasoning = wished.include_reasoning
        self._readers: dict[int, ChoiceReader] = {}  # by choice, once something of it was told
        self._num_top, self._num_prompt_top = prepared.num_top, prepared.num_prompt_top
        self._tokens = served.token_numbers if wished.return_tokens_as_token_ids else served.tokens
        self._served = served
        self._every_delta = {"role": "assistant", "content": "", "tool_calls": None} if whole_deltas else {}
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk" if self.stream else "chat.completion",
            "created": int(time.time()),
            "model": self.options.model,
            "system_fingerprint": "paged-core",
        }
        self._usage = Usage(self.prompts)
        self._tells_tokens = (
            self._num_top is not None or self.options.return_token_ids or (self.options.usage_in_every_chunk)
        )
        self.retells, self.named = self.options.return_token_ids, self.options.named

    def first_chunks(self) -> list[dict[str, Any]]:
        """The role, for every choice."""
        opening = {"role": "assistant", "content": ""}
        chunks = [self._chunk(index, opening, {}) for index in range(self.options.num_choices)]
        if self.options.return_token_ids:
            chunks[0]["prompt_token_ids"] = self.prompts[0].token_ids
        return chunks

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        """One for each of the choice's events: what else is told of the tokens goes with the first, how the choice ends
        with the last. Without events, as while a call of a tool forms, one is there if it has such things to tell."""
        self._usage.add(len(delta.token_ids))
        if delta.index not in self._readers:
            self._readers[delta.index] = self._talk.reader(skip_special_tokens=self._skips_special)
        events = self._told(self._readers[delta.index].feed(delta))
        contents = _contents(events)
        if not contents and not self._tells_tokens and delta.finish_reason is None and delta.prompt_logprobs is None:
            return []
        contents = contents or [{"content": ""} if delta.token_ids else {}]
        chunks = [self._chunk(delta.index, content, {}) for content in contents]
        chunks[0]["choices"][0] |= self._of_tokens(delta)
        chunks[-1]["choices"][0] |= _end(events)
        if delta.prompt_logprobs is not None and self._num_prompt_top is not None:
            chunks[0]["prompt_logprobs"] = self._prompt_logprobs(delta.prompt_logprobs)
        return chunks

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[dict[str, Any]]:
        if not self.options.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._usage.at_end(results)}]

    def answer(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        (result,) = results
        outputs = best(result.outputs, self.options.num_choices, in_order=self.params.use_beam_search)
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        self._usage.count_all(results)
        answer: dict[str, Any] = {**self._head, "choices": choices, "usage": self._usage.at_end(results)}
        if result.prompt_logprobs is not None and self._num_prompt_top is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(result.prompt_logprobs)
        if self.options.return_token_ids:
            answer["prompt_token_ids"] = self.prompts[0].token_ids
        return answer

    def _choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        events = self._told(self._talk.reader(skip_special_tokens=self._skips_special).feed(output))
        told = Answer().add(events)
        message: dict[str, Any] = {"role": "assistant", "content": told.text, "refusal": None}
        if told.tool_calls:
            message["content"] = told.text or None
            message["tool_calls"] = [_told_call(call) for call in told.tool_calls]
        if told.reasoning:
            message["reasoning_content"] = told.reasoning
        return {"index": index, "message": message, **_NO_NEWS, **self._of_tokens(output), **_end(events)}

    def _told(self, events: Sequence[Event]) -> Sequence[Event]:
        return events if self._tells_reasoning else [each for each in events if not isinstance(each, ReasoningDelta)]

    def _chunk(self, index: int, content: Mapping[str, Any], news: Mapping[str, Any]) -> dict[str, Any]:
        usage = {"usage": self._usage.body() if self.options.usage_in_every_chunk else None}
        return {
            **self._head,
            "choices": [{"index": index, "delta": {**self._every_delta, **content}, **_NO_NEWS, **news}],
            **(usage if self.options.include_usage else {}),
        }

    def _of_tokens(self, news: StreamDelta | CompletionOutput) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self._num_top is not None:
            told["logprobs"] = self._tokens.chat_logprobs(news.token_ids, news.logprobs or (), self._num_top)
        if self.options.return_token_ids:
            told["token_ids"] = list(news.token_ids)
        return told

    def _prompt_logprobs(self, entries: Any) -> Any:
        return self._served.tokens.prompt_logprobs(entries, self._num_prompt_top or 0)


_NO_NEWS = {"logprobs": None, "finish_reason": None, "stop_reason": None}  # of a choice


def _end(events: Sequence[Event]) -> dict[str, Any]:
    """The end of a choice, if it has ended."""
    last = events[-1] if events else None
    return {"finish_reason": last.reason, "stop_reason": last.stop_reason} if isinstance(last, Finish) else {}


def _contents(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Each event as a chunk's ``delta``."""
    return [content for event in events if (content := _content(event)) is not None]


def _content(event: Event) -> dict[str, Any] | None:
    match event:
        case TextDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, id, name):
            return {"tool_calls": [{"index": index, **_told_call(ToolCall(id, name, ""))}]}
        case ArgumentsDelta(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return None


def _told_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

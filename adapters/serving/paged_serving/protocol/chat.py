"""POST /v1/chat/completions: one body in, and what is to be sent for the engine's news."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import CompletionOutput, GenerationOutput, InvalidRequestError, Prompt, StreamDelta
from paged_serving.protocol.fields import Fields, ProtocolError, fields_of
from paged_serving.protocol.openai_fields import read_options, truncation
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.usage import Usage, best

_OURS = ("tokenize", "chat_template", "add_generation_prompt", "continue_final_message", "tools", "documents")
_RETURNS = ("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")
_PART = {"type", "text", "cache_control"}  # of a text part; the last is a hint that changes no answer
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object", "required": ["type", "text"],
                                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}},
    ]
}  # fmt: skip
_NO_TOOLS = "asks for tools, which this server doesn't call; describe them in the prompt"


class ChatCall:
    """One call under way; see protocol.call for its members.

    ``whole_deltas``: every streamed piece names the role and the (absent) tool calls. TGI's own chat clients need it;
    OpenAI's join the pieces, and need it not to be.

    Raises:
        ProtocolError: the body asks for something that can't be had, or the chat template refuses the messages.
    """

    def __init__(self, body: Any, served: ServedModel, request_id: str, *, whole_deltas: bool = False) -> None:
        fields = fields_of(body)
        _refuse(fields)
        render, truncate = _Rendering(fields, served), truncation(fields)
        self._num_top = _num_top(fields)
        self._num_prompt_top = fields.integer("prompt_logprobs")
        limit = fields.integer("max_tokens", low=1)
        own_limit = fields.integer("max_completion_tokens", limit, low=1)
        named = {"logprobs": "top_logprobs" if self._num_top else "logprobs", "prompt": "messages"}
        if limit is None:
            named["max_tokens"] = "max_completion_tokens"
        self.options = options = read_options(
            fields,
            served,
            max_tokens=served.default_max_tokens(None) if own_limit is None else own_limit,
            num_top=self._num_top,
            prompt_logprobs=self._num_prompt_top,
            named=named,
        )
        fields.finish()
        self.prompts = [served.finish_prompt("messages", render.prompt(served), truncate)]
        tells_prompt = options.return_token_ids or self._num_prompt_top is not None
        self.params = served.finish_params(
            options.params,
            self.prompts,
            options.grammar,
            copies=1 if tells_prompt else 0,
            named={**options.named, "echo": "return_token_ids"},
        )
        self.stream, self.grammar = options.stream, options.grammar
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

    def first_chunks(self) -> list[dict[str, Any]]:
        """Who speaks, for every choice."""
        opening = {"role": "assistant", "content": ""}
        chunks = [self._chunk(index, opening, None) for index in range(self.options.num_choices)]
        if self.options.return_token_ids:
            chunks[0]["prompt_token_ids"] = self.prompts[0].token_ids
        return chunks

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        self._usage.add(len(delta.token_ids))
        content = {"content": delta.text} if delta.text or delta.token_ids else {}
        chunk = self._chunk(delta.index, content, delta)
        if delta.prompt_logprobs is not None and self._num_prompt_top is not None:
            chunk["prompt_logprobs"] = self._prompt_logprobs(delta.prompt_logprobs)
        return [chunk]

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
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message, **self._end_of_choice(output)}

    def _chunk(self, index: int, content: Mapping[str, Any], news: StreamDelta | None) -> dict[str, Any]:
        end = self._end_of_choice(news) if news is not None else {"logprobs": None, "finish_reason": None}
        usage = {"usage": self._usage.body() if self.options.usage_in_every_chunk else None}
        return {
            **self._head,
            "choices": [{"index": index, "delta": {**self._every_delta, **content}, **end}],
            **(usage if self.options.include_usage else {}),
        }

    def _end_of_choice(self, news: StreamDelta | CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._num_top is not None:
            logprobs = self._served.tokens.chat_logprobs(news.token_ids, news.logprobs or (), self._num_top)
        end: dict[str, Any] = {"logprobs": logprobs, "finish_reason": news.finish_reason}
        end["stop_reason"] = news.stop_reason
        if self.options.return_token_ids:
            end["token_ids"] = list(news.token_ids)
        return end

    def _prompt_logprobs(self, entries: Any) -> Any:
        return self._served.tokens.prompt_logprobs(entries, self._num_prompt_top or 0)


class _Rendering:
    """The messages, and how they become one text."""

    def __init__(self, fields: Fields, served: ServedModel) -> None:
        # Each message takes a token at least.
        self._messages = [_message(each) for each in fields.objects("messages", served.max_model_len)]
        self._add_special_tokens = fields.flag("add_special_tokens")
        self._options: dict[str, Any] = dict(_template_options(fields))
        if not fields.flag("add_generation_prompt", True):
            self._options["add_generation_prompt"] = False
        if fields.flag("continue_final_message"):
            self._options.update(add_generation_prompt=False, continue_final_message=True)

    def prompt(self, served: ServedModel) -> Prompt:
        try:
            text = served.codec.render_chat(self._messages, **self._options)
        except InvalidRequestError as error:
            raise ProtocolError(str(error), "messages") from error
        return served.encode(text, add_special_tokens=self._add_special_tokens)


def _message(fields: Fields) -> dict[str, Any]:
    role, name = fields.text("role"), fields.text("name")
    if role is None:
        raise fields.error("role", "is missing")
    if role in ("tool", "function"):
        raise fields.error("role", _NO_TOOLS)
    for each in ("tool_calls", "function_call", "tool_call_id"):
        fields.only(each, [[]], _NO_TOOLS)
    fields.only("audio", [], "asks for sound; this server reads and writes text")
    fields.ignore("refusal", "annotations", "reasoning", "reasoning_content")  # of an answer that is sent back
    message = {"role": role, "content": _content(fields)}
    fields.finish()
    return message if name is None else {**message, "name": name}


def _content(fields: Fields) -> str | list[dict[str, str]]:
    """A string or text parts; the template gets the one that it reads."""
    content = fields.any("content", _CONTENT)
    if isinstance(content, str):
        return content
    told = fields.error("content", "must be a string or a list of text parts; this server reads text only")
    if not isinstance(content, list):
        raise told
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str) or not part.keys() <= _PART:
            raise told
        parts.append({"type": "text", "text": text})
    return parts


def _template_options(fields: Fields) -> Mapping[str, Any]:
    fields.only("chat_template", [], "can't be set by a request: a template is a program")
    options = fields.any("chat_template_kwargs", {"type": "object"})
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise fields.error("chat_template_kwargs", "must be a JSON object")
    for name in options:
        if name in _OURS + _RETURNS or name.startswith("_"):
            raise fields.error("chat_template_kwargs", f"may not hold {name!r}")
    return options


def _num_top(fields: Fields) -> int | None:
    wanted, num_top = fields.flag("logprobs"), fields.integer("top_logprobs")
    if num_top and not wanted:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    return num_top or 0 if wanted else None


def _refuse(fields: Fields) -> None:
    for name in ("tools", "functions"):
        fields.only(name, [[]], _NO_TOOLS)
    for name in ("tool_choice", "function_call"):
        fields.only(name, ["none", "auto"], _NO_TOOLS)
    fields.ignore("parallel_tool_calls")  # there are none
    fields.only("modalities", [["text"]], 'can only be ["text"]')
    fields.only("audio", [], "asks for sound; this server writes text")
    fields.only("prediction", [], "can't be honoured: this server takes no predicted output")
    fields.only("web_search_options", [], "can't be honoured: this server searches nothing")
    fields.only("moderation", [], "can't be honoured: this server moderates nothing")
    for name in ("reasoning_effort", "verbosity"):
        fields.only(name, [], "can't be honoured; if the chat template has such a switch, use chat_template_kwargs")

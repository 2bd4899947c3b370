"""POST /v1/chat/completions: one body in, and what is to be sent for the engine's news."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from paged_core import CompletionOutput, GenerationOutput, InvalidRequestError, Prompt, SamplingParams, StreamDelta
from paged_serving.protocol.bodies import Body, Ignored, Positive, Whole, must, only
from paged_serving.protocol.openai_body import OpenAIBody, Options, check_truncation, to_options
from paged_serving.protocol.parsing import ProtocolError, refuse
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.usage import Usage, best

_OURS = ("tokenize", "chat_template", "add_generation_prompt", "continue_final_message", "tools", "documents")
_RETURNS = ("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")
_NO_TOOLS = "asks for tools, which this server doesn't call; describe them in the prompt"
_IN_THE_TEMPLATE = "can't be honoured; if the chat template has such a switch, use chat_template_kwargs"


class TextPart(Body, frozen=True):
    type: Literal["text"]
    text: str
    cache_control: Ignored = None


class Message(Body, frozen=True):
    role: str
    content: Annotated[str | list[TextPart], must("a string or a list of text parts; this server reads text only")]
    name: str | None = None
    tool_calls: Annotated[Any, only([], why=_NO_TOOLS)] = None
    function_call: Annotated[Any, only([], why=_NO_TOOLS)] = None
    tool_call_id: Annotated[Any, only([], why=_NO_TOOLS)] = None
    audio: Annotated[Any, only(why="asks for sound; this server reads and writes text")] = None
    refusal: Ignored = None  # this and what follows: of an answer that is sent back
    annotations: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    elsewhere: ClassVar[Mapping[str, str]] = {
        "prompt": "is for completions; use messages, or POST /v1/completions",
        "suffix": "is for completions; use messages",
        "inputs": "is TGI's; use messages, or POST /generate",
    }
    messages: Annotated[list[Message], Meta(min_length=1), must("a list of at least one object")]
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: Whole | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None

    chat_template: Annotated[Any, only(why="can't be set by a request: a template is a program")] = None
    tools: Annotated[Any, only([], why=_NO_TOOLS)] = None
    functions: Annotated[Any, only([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", why=_NO_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", why=_NO_TOOLS)] = None
    parallel_tool_calls: Ignored = None  # there are none
    modalities: Annotated[Any, only(["text"], why='can only be ["text"]')] = None
    audio: Annotated[Any, only(why="asks for sound; this server writes text")] = None
    prediction: Annotated[Any, only(why="can't be honoured: this server takes no predicted output")] = None
    web_search_options: Annotated[Any, only(why="can't be honoured: this server searches nothing")] = None
    moderation: Annotated[Any, only(why="can't be honoured: this server moderates nothing")] = None
    reasoning_effort: Annotated[Any, only(why=_IN_THE_TEMPLATE)] = None
    verbosity: Annotated[Any, only(why=_IN_THE_TEMPLATE)] = None


@dataclass(frozen=True)
class Asked:
    """What a body comes to."""

    options: Options
    prompt: Prompt
    params: SamplingParams  # as the engine gets them
    num_top: int | None  # log-probabilities beside each token; None: none are told
    num_prompt_top: int | None


def read_chat(value: Any, served: ServedModel) -> ChatBody:
    """Raises ProtocolError as ``read_body`` does; of more messages than the model has places none is read."""
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if isinstance(messages, list) and len(messages) > served.max_model_len:
        refuse("messages", f"holds {len(messages)} objects; at most {served.max_model_len} can be served")
    return read_body(ChatBody, value, served)


def to_call(body: ChatBody, served: ServedModel) -> Asked:
    """
    Raises:
        ProtocolError: ``body`` asks for something that can't be had, or the chat template refuses the messages.
    """
    check_truncation(body)
    if body.top_logprobs and not body.logprobs:
        refuse("top_logprobs", "needs logprobs to be true")
    num_top = body.top_logprobs or 0 if body.logprobs else None
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    own = {} if body.max_tokens is not None else {"max_tokens": "max_completion_tokens"}
    options = to_options(
        body,
        served,
        max_tokens=served.default_max_tokens(None) if max_tokens is None else max_tokens,
        num_top=num_top,
        prompt_logprobs=body.prompt_logprobs,
        named={"logprobs": "top_logprobs" if num_top else "logprobs", "prompt": "messages", **own},
    )
    prompt = served.finish_prompt("messages", _rendered(body, served), body.truncate_prompt_tokens)
    tells_prompt = body.return_token_ids or body.prompt_logprobs is not None
    params = served.finish_params(
        options.params,
        [prompt],
        options.grammar,
        copies=1 if tells_prompt else 0,
        named={**options.named, "echo": "return_token_ids"},
    )
    return Asked(options, prompt, params, num_top, body.prompt_logprobs)


def _rendered(body: ChatBody, served: ServedModel) -> Prompt:
    """The messages as one text."""
    messages = [_message(each, f"messages[{place}]") for place, each in enumerate(body.messages)]
    options = _template_options(body.chat_template_kwargs or {})
    if not body.add_generation_prompt:
        options["add_generation_prompt"] = False
    if body.continue_final_message:
        options.update(add_generation_prompt=False, continue_final_message=True)
    try:
        text = served.codec.render_chat(messages, **options)
    except InvalidRequestError as error:
        raise ProtocolError(str(error), "messages") from error
    return served.encode(text, add_special_tokens=body.add_special_tokens)


def _message(message: Message, path: str) -> dict[str, Any]:
    """As templates read it. Of a content in parts the template gets the form that it reads."""
    if message.role in ("tool", "function"):
        refuse(f"{path}.role", _NO_TOOLS)
    content = message.content
    parts = content if isinstance(content, str) else [{"type": "text", "text": part.text} for part in content]
    name = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": parts, **name}


def _template_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _OURS + _RETURNS or name.startswith("_"):
            refuse("chat_template_kwargs", f"may not hold {name!r}")
    return dict(options)


class ChatCall:
    """One call under way; see protocol.call for its members.

    ``whole_deltas``: every streamed piece names the role and the (absent) tool calls. TGI's own chat clients need it;
    OpenAI's join the pieces, and need it not to be.

    Raises:
        ProtocolError: the body asks for something that can't be had, or the chat template refuses the messages.
    """

    def __init__(self, body: Any, served: ServedModel, request_id: str, *, whole_deltas: bool = False) -> None:
        wished = read_chat(body, served)
        asked = to_call(wished, served)
        self.options, self.prompts, self.params = asked.options, [asked.prompt], asked.params
        self.stream, self.grammar = asked.options.stream, asked.options.grammar
        self._num_top, self._num_prompt_top = asked.num_top, asked.num_prompt_top
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
            logprobs = self._tokens.chat_logprobs(news.token_ids, news.logprobs or (), self._num_top)
        end: dict[str, Any] = {"logprobs": logprobs, "finish_reason": news.finish_reason}
        end["stop_reason"] = news.stop_reason
        if self.options.return_token_ids:
            end["token_ids"] = list(news.token_ids)
        return end

    def _prompt_logprobs(self, entries: Any) -> Any:
        return self._served.tokens.prompt_logprobs(entries, self._num_prompt_top or 0)

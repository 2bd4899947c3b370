"""POST /v1/completions: one body in, JSON or chunks out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

from paged_core import CompletionOutput, GenerationOutput, Prompt, SamplingParams, StreamDelta, TokenLogprobs
from paged_serving.protocol.bodies import Defaults, DefaultsSource, Whole, must, only
from paged_serving.protocol.offsets import Placed, prompt_offsets
from paged_serving.protocol.openai_body import OpenAIBody, Options, check_truncation, to_options
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel
from paged_serving.protocol.usage import Usage, best

_MAX_TOKENS = 16  # OpenAI's default
_News = TypeVar("_News", StreamDelta, CompletionOutput)


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    elsewhere: ClassVar[Mapping[str, str]] = {
        "max_completion_tokens": "is for chats; use max_tokens",
        "messages": "is for chats; use prompt, or POST /v1/chat/completions",
        "tools": "is for chats; use POST /v1/chat/completions",
        "inputs": "is TGI's; use prompt, or POST /generate",
    }
    prompt: Annotated[str | list[str | int | list[int]], must("a string, token ids, or a list of these")]
    add_special_tokens: bool = True
    echo: bool = False
    max_tokens: Whole = _MAX_TOKENS
    logprobs: Whole | None = None
    suffix: Annotated[Any, only("", why="can't be honoured: the model continues texts, it doesn't fill gaps")] = None

    @classmethod
    def defaults(cls, served: DefaultsSource, wished: Mapping[str, Any]) -> Defaults:
        advised = super().defaults(served, wished)[cls]
        return {cls: {**advised, "max_tokens": served.default_max_tokens(_MAX_TOKENS)}}


@dataclass(frozen=True)
class PreparedCompletion:
    """What a body comes to."""

    options: Options
    prompts: list[Prompt]
    params: SamplingParams  # as the engine gets them
    echo: bool
    num_top: int | None  # log-probabilities beside each token; None: none are told
    num_prompt_top: int | None
    only_echo: bool  # only the prompt is returned, without the engine's one token


def to_call(body: CompletionBody, served: ServedModel) -> PreparedCompletion:
    """
    Raises:
        ProtocolError: ``body`` asks for something that can't be had.
    """
    check_truncation(body)
    if body.max_tokens == 0 and not body.echo:
        refuse("max_tokens", "is 0; that needs echo: else there is nothing to answer")
    of_prompt = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        of_prompt = max(body.logprobs, of_prompt or 0)
    options = to_options(
        body,
        served,
        max_tokens=body.max_tokens or 1,
        num_top=body.logprobs,
        prompt_logprobs=of_prompt,
        named={"prompt_logprobs": "logprobs"} if body.prompt_logprobs is None else {},  # asked for by echo
    )
    prompts = served.prompts("prompt", body.prompt, body.add_special_tokens, body.truncate_prompt_tokens)
    tells_prompt = body.echo or body.return_token_ids or of_prompt is not None
    params = served.finish_params(
        options.params,
        prompts,
        options.grammar,
        copies=options.num_choices if tells_prompt else 0,
        named=options.named if body.echo else {**options.named, "echo": "return_token_ids"},
    )
    return PreparedCompletion(
        options, prompts, params, body.echo, body.logprobs, body.prompt_logprobs, body.max_tokens == 0
    )


class CompletionCall:
    """One call under way; see protocol.call for its members.

    Raises:
        ProtocolError: the body asks for something that can't be had.
    """

    def __init__(self, body: Any, served: ServedModel, request_id: str) -> None:
        wished = read_body(CompletionBody, body, served)
        prepared = to_call(wished, served)
        self.options, self.prompts, self.params = prepared.options, prepared.prompts, prepared.params
        self.stream, self.grammar = prepared.options.stream, prepared.options.grammar
        self._served, self._echo, self._only_echo = served, prepared.echo, prepared.only_echo
        self._num_top, self._num_prompt_top = prepared.num_top, prepared.num_prompt_top
        self._tokens = served.token_numbers if wished.return_tokens_as_token_ids else served.tokens
        self._echoes = [self._text_of(prompt) if prepared.echo else "" for prompt in self.prompts]
        self._echo_offsets = [
            prompt_offsets(prompt, text, served.tokens, served.codec)
            if prepared.echo and prepared.num_top is not None
            else []
            for prompt, text in zip(self.prompts, self._echoes, strict=True)
        ]
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.options.model,
        }
        self._usage = Usage(self.prompts)
        self.retells, self.named = prepared.echo or self.options.return_token_ids, self.options.named
        self._placed: dict[int, Placed] = {}  # by choice, once something of it was told
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}  # by prompt

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, number: int, delta: StreamDelta) -> list[dict[str, Any]]:
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[number] = delta.prompt_logprobs
        choice = self._choice(number, number * self.options.num_choices + delta.index, self._wanted(delta))
        self._usage.add(0 if self._only_echo else len(delta.token_ids))
        usage = {"usage": self._usage.body() if self.options.usage_in_every_chunk else None}
        return [{**self._head, "choices": [choice], **(usage if self.options.include_usage else {})}]

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[dict[str, Any]]:
        if not self.options.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._usage.at_end(results)}]

    def answer(self, results: Sequence[GenerationOutput]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for number, result in enumerate(results):
            if result.prompt_logprobs is not None:
                self._prompt_logprobs[number] = result.prompt_logprobs
            for output in best(result.outputs, self.options.num_choices, in_order=self.params.use_beam_search):
                choices.append(self._choice(number, len(choices), self._wanted(output)))
                self._usage.add(0 if self._only_echo else len(output.token_ids))
        if len(choices) < sum(len(result.outputs) for result in results):
            self._usage.count_all(results)
        return {**self._head, "choices": choices, "usage": self._usage.at_end(results)}

    def _wanted(self, news: _News) -> _News:
        if not self._only_echo:
            return news
        finish_reason = "length" if news.finish_reason is not None else None
        return replace(news, text="", token_ids=(), logprobs=(), finish_reason=finish_reason, stop_reason=None)

    def _choice(self, number: int, index: int, news: StreamDelta | CompletionOutput) -> dict[str, Any]:
        """A choice, or a piece of one; the first piece has the data about the prompt."""
        first = index not in self._placed
        if first:
            self._placed[index] = Placed(self._served.codec, self.params.skip_special_tokens)
            self._placed[index].echo(self._echoes[number])
        text = self._echoes[number] + news.text if first else news.text
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        token_ids, of_prompt = list(news.token_ids), self._prompt_logprobs.get(number, ()) if first else ()
        if self._num_top is not None:
            told = self._placed[index].push(
                news.text, token_ids, news.logprobs or (), ended=news.finish_reason is not None
            )
            token_ids = [token for token, _, _ in told]
            choice["logprobs"] = self._logprobs(number if first else None, told, self._num_top)
        choice["finish_reason"], choice["stop_reason"] = news.finish_reason, news.stop_reason
        if first and self._num_prompt_top is not None:
            choice["prompt_logprobs"] = self._served.tokens.prompt_logprobs(of_prompt, self._num_prompt_top)
        if self.options.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = self.prompts[number].token_ids if first else None
        return choice

    def _logprobs(self, echoed: int | None, told: Sequence[tuple[int, TokenLogprobs, int]], num_top: int) -> Any:
        """Of these tokens, with those of the prompt ``echoed`` before them."""
        token_ids = [token for token, _, _ in told]
        entries: list[TokenLogprobs | None] = [entry for _, entry, _ in told]
        offsets = [place for _, _, place in told]
        if echoed is not None and self._echo:
            token_ids = [*self.prompts[echoed].token_ids, *token_ids]
            entries = [*self._prompt_logprobs.get(echoed, ()), *entries]
            offsets = [*self._echo_offsets[echoed], *offsets]
        return self._tokens.completion_logprobs(token_ids, entries, offsets, num_top)

    def _text_of(self, prompt: Prompt) -> str:
        return prompt.text if prompt.text is not None else self._served.codec.decode(prompt.token_ids)

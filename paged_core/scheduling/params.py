"""SamplingParams: what a caller asks of a request, checked once. This file knows nothing of requests, text or
tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

LogitsProcessor = Callable[[Any, Any], Any]
"""Hugging Face's form, one row at a time: ``processor(input_ids i64 [1, L], scores f32 [1, V]) -> scores``.

A processor that keeps state for a row has ``for_request(request) -> LogitsProcessor`` instead. It is called for each
row when the request is added. Rows of one prompt, and prompts that share their SamplingParams, then share no state.
"""


class RowsProcessor(Protocol):
    """An object that makes a logits processor for each row."""

    def for_request(self, request: Any) -> LogitsProcessor: ...  # a Request with its own SamplingParams


def for_row(processor: LogitsProcessor | RowsProcessor, request: Any) -> LogitsProcessor:
    """Return the processor of one row."""
    return processor.for_request(request) if _is_for_rows(processor) else cast(LogitsProcessor, processor)


class InvalidRequestError(ValueError):
    """The request itself is at fault; other requests go on. ``param`` names the field at fault, if it is one field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and defaults are vLLM's.

    The layer that owns the tokenizer honours ``stop``, ``bad_words``, ``skip_special_tokens`` and
    ``include_stop_str_in_output``; the engine itself sees token ids only.

    None stands for an empty list. Lists are copied when the object is made, and become tuples.

    Raises:
        InvalidRequestError: a value is of the wrong type or out of its range; the message begins with the field's name.
    """

    n: int = 1  # sequences returned for one prompt
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # draw from this many most likely tokens; 0 (or -1) keeps all
    top_p: float = 1.0  # draw from the most likely tokens that sum to this, in (0, 1]; 0 for greedy requests only
    min_p: float = 0.0  # drop tokens with less than this share of the most likely token's probability
    repetition_penalty: float = 1.0  # above 1 discourages tokens of prompt and output (Keskar et al., CTRL, 2019)
    presence_penalty: float = 0.0  # subtracted once from each token that the output has, as in OpenAI's API
    frequency_penalty: float = 0.0  # subtracted for each time that the output has the token, as in OpenAI's API
    seed: int | None = None  # None: the engine draws one
    logit_bias: Mapping[int, float] | None = None  # token id -> number that is added to its logit
    bad_words: Sequence[str] = ()  # texts that must not appear in the output
    bad_words_token_ids: Sequence[Sequence[int]] = ()  # ids; the last is forbidden after the others
    allowed_token_ids: Sequence[int] | None = None  # the only ids that may be chosen; None: all
    min_tokens: int = 0  # stop tokens are forbidden until the output has this many tokens
    max_tokens: int | None = 16  # None: as many as the model's length allows
    stop: str | Sequence[str] = ()  # texts that end the output
    stop_token_ids: Sequence[int] = ()  # ids that end the output, beside the model's end-of-sequence ids
    include_stop_str_in_output: bool = False  # keep the stop string in the text
    ignore_eos: bool = False  # end-of-sequence tokens don't end the output; min_tokens forbids them instead
    logprobs: int | None = None  # for this many most likely tokens and the chosen one; 0: for the chosen one only
    prompt_logprobs: int | None = None  # the same for each token of the prompt
    skip_special_tokens: bool = True  # leave special tokens out of the text
    priority: int = 0  # lower runs first, under the "priority" policy
    cache_salt: str | None = None  # prefix-cache blocks are shared only between equal salts
    use_beam_search: bool = False  # n beams instead of n samples; the n best sequences come back, best first
    length_penalty: float = 1.0  # a beam's score: sum of log-probabilities / length ** length_penalty
    early_stopping: bool = False  # end the search once n sequences have ended, even if a better one could follow
    logits_processors: Sequence[LogitsProcessor | RowsProcessor] = field(default=(), compare=False)  # called in order

    def __post_init__(self) -> None:
        for name, items in _LISTS.items():
            object.__setattr__(self, name, _items(name, getattr(self, name), items))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if _is_number(self.top_p) and self.top_p == 0 and self.greedy:  # it means greedy, as temperature=0 does
            object.__setattr__(self, "top_p", 1.0)
        for name, number in _NUMBERS.items():
            _check_number(name, getattr(self, name), number)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; it must be True or False", name)
        if self.cache_salt is not None and not _is_text(self.cache_salt):
            raise InvalidRequestError(f"cache_salt is {self.cache_salt!r}; it must be {_TEXT}", "cache_salt")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError(
                "allowed_token_ids is empty: no token could ever be chosen; use None to allow all"
            )
        _check_bias(self.logit_bias)
        _check_beams(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen. Every way to ask for that is recognised here, and only
        here."""
        return self.temperature == 0 or self.top_k == 1


class _Number(NamedTuple):
    low: float
    high: float
    whole: bool = False
    optional: bool = False  # whether None is allowed, with a meaning of its own


_NUMBERS = {
    "n": _Number(1, 4096, whole=True),
    "temperature": _Number(0, 1e6),
    "top_k": _Number(0, 2**31 - 1, whole=True),
    "top_p": _Number(1e-12, 1),
    "min_p": _Number(0, 1),
    "repetition_penalty": _Number(1e-6, 1e6),
    "presence_penalty": _Number(-1e6, 1e6),
    "frequency_penalty": _Number(-1e6, 1e6),
    "seed": _Number(-(2**63), 2**64 - 1, whole=True, optional=True),
    "min_tokens": _Number(0, 2**31 - 1, whole=True),
    "max_tokens": _Number(1, 2**31 - 1, whole=True, optional=True),
    "logprobs": _Number(0, 2**31 - 1, whole=True, optional=True),
    "prompt_logprobs": _Number(0, 2**31 - 1, whole=True, optional=True),
    "priority": _Number(-(2**31), 2**31 - 1, whole=True),
    "length_penalty": _Number(-20, 20),
}
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "use_beam_search")
_TEXT = "a str that can be written as UTF-8"


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # an unpaired surrogate
        return False
    return True


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class _Items(NamedTuple):
    kind: str  # what an item must be
    fits: Callable[[Any], bool]
    one_is_many: bool = False  # whether a str by itself stands for a list with that str
    optional: bool = False  # whether None has a meaning of its own; if not, it stands for ()


def _is_processor(item: Any) -> bool:
    return callable(item) or _is_for_rows(item)


def _is_for_rows(item: Any) -> TypeGuard[RowsProcessor]:
    return hasattr(item, "for_request")


_LISTS = {
    "stop": _Items(f"{_TEXT}, and not empty", lambda item: _is_text(item) and bool(item), one_is_many=True),
    "stop_token_ids": _Items("a token id (an int)", _is_token),
    "bad_words": _Items(_TEXT, _is_text, one_is_many=True),
    "bad_words_token_ids": _Items(
        "a sequence of token ids (ints)", lambda item: isinstance(item, Sequence) and all(map(_is_token, item))
    ),
    "allowed_token_ids": _Items("a token id (an int)", _is_token, optional=True),
    "logits_processors": _Items("a function (input_ids, scores) -> scores", _is_processor),
}


def _items(name: str, value: Any, items: _Items) -> tuple[Any, ...] | None:
    """Return a copy of the field's items, so that later changes of the caller's list change nothing."""
    if value is None:
        return None if items.optional else ()
    if isinstance(value, str) and items.one_is_many:
        value = (value,)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} is {value!r}; it must be a list, each item {items.kind}", name)
    found = tuple(value)
    for item in found:
        if not items.fits(item):
            raise InvalidRequestError(f"{name} holds {item!r}; each item must be {items.kind}", name)
    return found


def _check_number(name: str, value: Any, number: _Number) -> None:
    if value is None and number.optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not number.low <= value <= number.high:
        told = f"{name} is {value!r}; it must be a number from {number.low} to {number.high}"
        raise InvalidRequestError(told, name)
    if number.whole and not isinstance(value, int):
        raise InvalidRequestError(f"{name} is {value!r}; it must be an integer", name)


def _check_bias(bias: Any) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(f"logit_bias is {bias!r}; it must be a dict, token id -> number", "logit_bias")
    for token, value in bias.items():
        if not _is_token(token) or not _is_number(value):
            told = f"logit_bias holds {token!r}: {value!r}; it must be a dict, token id -> number"
            raise InvalidRequestError(told, "logit_bias")
        if not -math.inf < value < math.inf:
            told = "logit_bias holds a value that is not finite; use bad_words to forbid a token"
            raise InvalidRequestError(told, "logit_bias")


_NOT_WITH_BEAMS = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                   "logit_bias", "bad_words", "bad_words_token_ids", "allowed_token_ids", "min_tokens", "stop",
                   "logprobs", "prompt_logprobs", "logits_processors")  # fmt: skip


def _check_beams(params: SamplingParams) -> None:
    if not isinstance(params.early_stopping, bool):
        raise InvalidRequestError(
            f"early_stopping is {params.early_stopping!r}; it must be True, or False: then the search goes on as long "
            "as a better sequence may come"
        )
    if not params.use_beam_search:
        for name in ("length_penalty", "early_stopping"):
            if getattr(params, name) != getattr(SamplingParams, name):
                raise InvalidRequestError(f"{name} needs use_beam_search; samples have no use for it")
        return
    out = "leave it out, or sample with n instead"
    if params.temperature not in (0, 1):
        raise InvalidRequestError(f"temperature is {params.temperature}, but use_beam_search draws nothing; {out}")
    for name in _NOT_WITH_BEAMS:
        value = getattr(params, name)
        if value != getattr(SamplingParams, name) and value not in ((), [], {}):
            raise InvalidRequestError(f"{name} can't go with use_beam_search; {out}")

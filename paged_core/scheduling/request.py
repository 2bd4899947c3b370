"""What is asked (SamplingParams), what is under way (Request), and what comes back (RequestOutput).

A Request is one row: one sequence of token ids with its own block table. A caller who asks for ``n=3`` gets three
Requests that share an id, a prompt and a Group, and differ in ``index``. Nothing here knows of text or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

LogitsProcessor = Callable[[Any, Any], Any]
"""Hugging Face's form, one row at a time: ``processor(input_ids i64 [1, L], scores f32 [1, V]) -> scores``."""


class InvalidRequestError(ValueError):
    """The request itself is at fault; other requests are not touched. ``param``: what in it, where one thing is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestStatus(Enum):
    UNBORN = "unborn"  # will fork from a sibling of the same prompt, once that one has computed it
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(str, Enum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's length limit
    ABORT = "abort"  # the caller cancelled it
    ERROR = "error"  # something of this request's own failed; see RequestOutput.error

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. The names and defaults are those that vLLM's users know.

    Text-level fields (``stop``, ``bad_words``, ``skip_special_tokens``, ``include_stop_str_in_output``) are honoured
    by the layer that owns the tokenizer; the engine itself sees token ids only.

    Raises:
        InvalidRequestError: a value is out of its range; the message names the field, the value and the range.
    """

    n: int = 1  # sequences returned for one prompt
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 (or -1) keeps all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # >1 discourages tokens of prompt and output (Keskar et al., CTRL, 2019)
    presence_penalty: float = 0.0  # OpenAI's, over output tokens
    frequency_penalty: float = 0.0  # OpenAI's, over output tokens
    seed: int | None = None  # None: the engine draws one
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()  # sequences whose last token may not complete them
    allowed_token_ids: Sequence[int] | None = None
    min_tokens: int = 0  # no stop token is sampled before that many output tokens
    max_tokens: int | None = 16  # None: as many as the model's length allows
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # that many most likely tokens beside the chosen one; 0: the chosen one only
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = 0  # lower runs first, under the "priority" policy
    cache_salt: str | None = None  # prefix-cache blocks are shared only between equal salts
    use_beam_search: bool = False  # n beams instead of n samples; the n best sequences come back, best first
    length_penalty: float = 1.0  # a beam's score: sum of log-probabilities / length ** length_penalty
    early_stopping: bool = False  # end the search once n sequences have ended, whatever might still come
    logits_processors: Sequence[LogitsProcessor] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InvalidRequestError(f"{name} is {value!r}; it must be a number from {low} to {high}")
        for name in (
            "n",
            "top_k",
            "min_tokens",
            "max_tokens",
            "logprobs",
            "prompt_logprobs",
            "seed",
            "priority",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidRequestError(f"{name} is {value!r}; it must be an integer")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise InvalidRequestError("stop holds an empty string or something that is no string")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError(
                "allowed_token_ids is empty: no token could ever be chosen; use None to allow all"
            )
        if self.logit_bias and any(not math.isfinite(bias) for bias in self.logit_bias.values()):
            raise InvalidRequestError("logit_bias holds a value that is not finite; use bad_words to forbid a token")
        _check_beams(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken. One definition, so that every spelling takes one path."""
        return self.temperature == 0 or self.top_k == 1


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 4096),
    ("temperature", 0, 1e6),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 1e-12, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 1e-6, 1e6),
    ("presence_penalty", -1e6, 1e6),
    ("frequency_penalty", -1e6, 1e6),
    ("seed", -(2**63), 2**64 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("logprobs", 0, 2**31 - 1),
    ("prompt_logprobs", 0, 2**31 - 1),
    ("priority", -(2**31), 2**31 - 1),
    ("length_penalty", -20, 20),
)
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


class Logprob(NamedTuple):
    """Log of a token's probability under the model, before any change to the logits; rank 1 is the likeliest."""

    logprob: float
    rank: int


class Group:
    """Requests that came together. ``lockstep`` groups advance, sample and are preempted all or none."""

    __slots__ = ("lockstep", "members")

    def __init__(self, lockstep: bool = False) -> None:
        self.members: list[Request] = []  # by index
        self.lockstep = lockstep


class Request:
    """One row under way. Only the Scheduler changes it; a selector keeps its state elsewhere, keyed by this object."""

    __slots__ = (
        "__weakref__",
        "arrival",
        "block_table",
        "digests",
        "error",
        "finish_reason",
        "group",
        "held",
        "id",
        "index",
        "max_total",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_published",
        "num_recomputed_to",
        "params",
        "seed",
        "selector",
        "status",
        "stop_token_ids",
        "table_version",
        "tokens",
    )

    def __init__(
        self,
        id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        group: Group | None = None,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        selector: Any = None,
    ) -> None:
        self.id = id
        self.index = index  # which of the n samples
        self.params = params
        self.tokens: list[int] = list(prompt)  # prompt, then output
        self.num_prompt = len(self.tokens)
        self.seed = seed
        self.stop_token_ids = stop_token_ids  # eos (unless ignored) and the caller's own
        self.selector = selector  # a TokenSelector of its own; None: the engine's sampler
        self.group = group if group is not None else Group()
        self.group.members.append(self)
        self.status = RequestStatus.WAITING
        self.held = False  # its selector will bring the next token later (Engine.resume): nothing to compute until then
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.arrival = 0  # order of admission to the queue
        self.max_total = self.num_prompt + 1  # len(tokens) at which it ends; the scheduler knows it once it is added
        self.num_computed = 0  # tokens whose K/V are in the cache
        self.num_cached = 0  # of those, found in the prefix cache
        self.block_table: list[int] = []
        self.table_version = 0  # grows whenever block_table changes other than by appending
        self.digests: list[bytes] = []  # prefix digests of the leading full blocks
        self.num_published = 0  # leading blocks known to the prefix index
        self.num_recomputed_to = 0  # len(tokens) at the last preemption: past it, progress has been made

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of its prompt are still of interest: until its first token has been told."""
        return self.params.prompt_logprobs is not None and len(self.tokens) == self.num_prompt

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def __repr__(self) -> str:
        state = self.finish_reason or self.status.value
        return f"<Request {self.id}[{self.index}] {self.num_computed}/{len(self.tokens)} tokens, {state}>"


class Selection(NamedTuple):
    """What a TokenSelector chose for S sampled rows, in the order of the rows it was given."""

    token_ids: Sequence[int | None]  # [S]  None: held until the selector's owner calls Engine.resume
    logprobs: Sequence[Mapping[int, Logprob] | None] | None = None  # [S]  chosen token first
    errors: Mapping[int, str] | None = None  # row -> why that row's request must end
    parents: Sequence[int] | None = None  # [S]  row to continue from (a fork), for lockstep groups only
    finished: Mapping[int, FinishReason] | None = None  # row -> the selector's own verdict that the row is done


class RequestOutput(NamedTuple):
    """News of one request after one step: what was added, and how it ended if it did."""

    request: Request
    token_ids: Sequence[int]  # new since the last output; empty when only the end is told
    logprobs: Sequence[Mapping[int, Logprob]] | None = None  # one a new token
    finish_reason: FinishReason | None = None  # set exactly once for each request
    error: str | None = None
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = (
        None  # [num_prompt], first None; with the first token
    )

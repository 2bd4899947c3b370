"""Request: a row that has not ended. RequestOutput: what the caller gets of it after a step.

A Request is one row: one sequence of token ids with its own block table. A caller who asks for ``n=3`` gets three
Requests that share an id, a prompt and a Group, and differ in ``index``. This file knows nothing of text or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from paged_core.scheduling.block_table import BlockTable
from paged_core.scheduling.params import SamplingParams


class RequestStatus(Enum):
    PENDING_FORK = "pending fork"  # it forks from a sibling of the same prompt, once that one has computed the prompt
    WAITING = "waiting"
    LOADING = "loading"  # it has a seat and blocks, whose K/V a tier is loading; steps go on without it
    RUNNING = "running"
    FINISHED = "finished"
    UNBORN = PENDING_FORK  # the name of PENDING_FORK before 0.2


class FinishReason(str, Enum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's length limit
    ABORT = "abort"  # the caller cancelled it
    ERROR = "error"  # the request itself failed; see RequestOutput.error

    def __str__(self) -> str:
        return self.value


class Logprob(NamedTuple):
    """Log of a token's probability under the model, before any change to the logits. Rank 1 is the most likely
    token."""

    logprob: float
    rank: int


class Group:
    """Requests that came together. The members of a ``lockstep`` group advance, sample and are preempted together."""

    __slots__ = ("lockstep", "members")

    def __init__(self, lockstep: bool = False) -> None:
        self.members: list[Request] = []  # by index
        self.lockstep = lockstep


class Request:
    """One row that has not ended. Only the Scheduler changes it; a selector keeps its state elsewhere, keyed by this
    object."""

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
        "num_loaded",
        "num_prompt",
        "num_published",
        "num_recomputed_to",
        "num_swapped",
        "params",
        "rank",
        "seed",
        "selector",
        "status",
        "stop_token_ids",
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
        self.index = index  # its number among the n samples
        self.params = params
        self.tokens: list[int] = list(prompt)  # prompt, then output
        self.num_prompt = len(self.tokens)
        self.seed = seed
        self.stop_token_ids = stop_token_ids  # eos (unless ignored) and the caller's own
        self.selector = selector  # its own TokenSelector; None: the engine's sampler
        self.group = group if group is not None else Group()
        self.group.members.append(self)
        self.status = RequestStatus.WAITING
        self.held = False  # its selector brings the next token later (Engine.resume); nothing to compute until then
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.arrival = 0  # order of admission to the queue
        self.rank: tuple[Any, int, int] = (0, 0, index)  # place in the policy's order: its key, arrival, index
        self.max_total = self.num_prompt + 1  # len(tokens) at which it ends; set when the request is added
        self.num_computed = 0  # tokens whose K/V are in the cache
        self.num_cached = 0  # of those, tokens found in the prefix cache
        self.num_loaded = 0  # of these, tokens loaded by a tier
        self.block_table = BlockTable()
        self.digests: list[bytes] = []  # prefix digests of the leading full blocks
        self.num_published = 0  # leading blocks that are in the prefix index, if the cache kept them
        self.num_swapped = 0  # tokens whose K/V went to a tier at the last preemption, a partly filled block included
        self.num_recomputed_to = 0  # len(tokens) at the last preemption; the request has made progress once it has more

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of its prompt are still needed: until its first token has been returned."""
        return self.params.prompt_logprobs is not None and len(self.tokens) == self.num_prompt

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def __repr__(self) -> str:
        state = self.finish_reason or self.status.value
        return f"<Request {self.id}[{self.index}] {self.num_computed}/{len(self.tokens)} tokens, {state}>"


class Selection(NamedTuple):
    """The choice of a TokenSelector for S sampled rows, in the order in which it got the rows."""

    token_ids: Sequence[int | None]  # [S]  None: held until the selector's owner calls Engine.resume
    logprobs: Sequence[Mapping[int, Logprob] | None] | None = None  # [S]  chosen token first
    errors: Mapping[int, str] | None = None  # row -> error message; that row's request ends with it
    parents: Sequence[int] | None = None  # [S]  row whose tokens each row continues (a fork), for lockstep groups only
    finished: Mapping[int, FinishReason] | None = None  # row -> why the selector ends that row


class RequestOutput(NamedTuple):
    """What a step added to one request, and how the request ended if it did."""

    request: Request
    token_ids: Sequence[int]  # new since the last output; empty if the output only reports the end
    logprobs: Sequence[Mapping[int, Logprob]] | None = None  # one mapping for each new token
    finish_reason: FinishReason | None = None  # set in the last output of each request, and only there
    error: str | None = None
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = (
        None  # [num_prompt], the first is None; comes with the first token
    )

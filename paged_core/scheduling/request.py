"""What is under way (Request), and what comes back (RequestOutput).

A Request is one row: one sequence of token ids with its own block table. A caller who asks for ``n=3`` gets three
Requests that share an id, a prompt and a Group, and differ in ``index``. Nothing here knows of text or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from paged_core.scheduling.block_table import BlockTable
from paged_core.scheduling.params import SamplingParams


class RequestStatus(Enum):
    PENDING_FORK = "pending fork"  # it forks from a sibling of the same prompt, once that one has computed it
    WAITING = "waiting"
    LOADING = "loading"  # has a seat and blocks, whose K/V are on their way from a tier; steps go on without it
    RUNNING = "running"
    FINISHED = "finished"
    UNBORN = PENDING_FORK  # its name before 0.2


class FinishReason(str, Enum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's length limit
    ABORT = "abort"  # the caller cancelled it
    ERROR = "error"  # something of this request's own failed; see RequestOutput.error

    def __str__(self) -> str:
        return self.value


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
        self.rank: tuple[Any, int, int] = (0, 0, index)  # where it stands among others: its policy's key first
        self.max_total = self.num_prompt + 1  # len(tokens) at which it ends; the scheduler knows it once it is added
        self.num_computed = 0  # tokens whose K/V are in the cache
        self.num_cached = 0  # of those, found in the prefix cache
        self.num_loaded = 0  # of these, brought by a tier
        self.block_table = BlockTable()
        self.digests: list[bytes] = []  # prefix digests of the leading full blocks
        self.num_published = 0  # leading blocks known to the prefix index
        self.num_swapped = 0  # tokens whose K/V a tier was given at the last preemption, its last block included
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

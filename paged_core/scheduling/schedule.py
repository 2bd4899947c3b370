"""What the Scheduler gives the execution side for one step (Schedule), and the limits that the Scheduler keeps
(Limits)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paged_core.scheduling.block_pool import BlockContent
from paged_core.scheduling.block_table import BlockMove
from paged_core.scheduling.request import Request


class ScheduledChunk(NamedTuple):
    """Consecutive tokens of one request that the step computes."""

    request: Request
    start: int  # position of the first token
    num_tokens: int
    samples: tuple[Request, ...]  # rows that sample from the last position: none while tokens are still lacking,
    #                               the request itself, or all siblings of a fork at the end of their prompt


class Load:
    """Blocks that a tier loads, in this order: for one request, or for the rows of a lockstep group, which begin
    together."""

    __slots__ = ("abandoned", "beside", "contents", "met", "num_saved")

    def __init__(self, contents: Sequence[BlockContent], num_saved: int, beside: bool = False) -> None:
        self.contents = contents
        self.num_saved = num_saved  # tokens that need not be computed if the load succeeds
        self.beside = beside  # its request computes earlier tokens meanwhile, and takes over the blocks that have come
        self.met = False  # the request has computed up to the loaded blocks: it needs no more of them
        self.abandoned = False  # no request waits for it any more, and its blocks may belong to others


class Schedule(NamedTuple):
    """One step's work."""

    chunks: Sequence[ScheduledChunk]
    moves: Sequence[BlockMove]
    preempted: Sequence[Request]
    offloads: Sequence[BlockContent] = ()  # contents of evicted blocks: a tier may copy them before the moves are made
    loads: Sequence[Load] = ()  # to begin: a tier loads their blocks


@dataclass(frozen=True)
class Limits:
    """The most that a step and a request may take."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark_blocks: int  # kept free at admission, so that running requests can grow
    max_prompt_logprob_rows: int
    sliding_window: int | None = None  # in tokens: the widest one, if every layer has a window; else None
    enable_prefix_caching: bool = True

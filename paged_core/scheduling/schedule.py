"""What the scheduler hands to the execution side for one step, and the limits it keeps."""

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
    start: int  # position of the first
    num_tokens: int
    samples: tuple[Request, ...]  # rows that sample from the last position: none while tokens are still lacking,
    #                               the request itself, or all siblings of a fork at the end of their prompt


class Load:
    """Blocks that a tier is to bring, in this order: for one request, or for the rows of a lockstep group, which begin
    together."""

    __slots__ = ("abandoned", "beside", "contents", "met", "num_saved")

    def __init__(self, contents: Sequence[BlockContent], num_saved: int, beside: bool = False) -> None:
        self.contents = contents
        self.num_saved = num_saved  # tokens that need not be computed if it comes
        self.beside = beside  # its row computes what is before it meanwhile, and goes on with whatever has come
        self.met = False  # that row has all of it: what is still to come is for nobody
        self.abandoned = False  # nobody waits for it any more, and its blocks are others'


class Schedule(NamedTuple):
    """One step's work."""

    chunks: Sequence[ScheduledChunk]
    moves: Sequence[BlockMove]
    preempted: Sequence[Request]
    offloads: Sequence[BlockContent] = ()  # given up: a tier may copy them before the moves are made
    loads: Sequence[Load] = ()  # a tier is to bring them


@dataclass(frozen=True)
class Limits:
    """What a step and a request may take."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark_blocks: int  # kept free at admission, so that running requests can grow
    max_prompt_logprob_rows: int
    sliding_window: int | None = None  # set if every layer has one: the widest
    enable_prefix_caching: bool = True

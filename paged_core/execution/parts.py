"""Computes a step in parts if memory has no room for the whole: with fewer chunks, then with shorter ones.

Where the parts end is no decision about requests: all tokens of the step are computed, and their logits are the same.
The scheduler decides whether later steps should be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paged_core.execution.batch import Batch, BatchBuilder, PromptRows
from paged_core.execution.model_runner import ModelRunner
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Schedule, ScheduledChunk


class Computed(NamedTuple):
    """The result of a step."""

    logits: Tensor  # [S + P + E, vocab]  of sampled rows, then of prompt_rows, then of ends
    sample_requests: tuple[Request, ...]  # S rows
    prompt_rows: tuple[PromptRows, ...]  # P positions together
    ends: tuple[Request, ...]  # E rows: the last token of each chunk that doesn't sample
    num_fitting: int | None = None  # tokens of the largest part that fitted into memory; None: the step wasn't divided

    def divide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the sampled rows ``[S, vocab]``, of prompt_rows ``[P, vocab]`` and of ends ``[E,
        vocab]``."""
        first, last = len(self.sample_requests), self.logits.shape[0] - len(self.ends)
        return self.logits[:first], self.logits[first:last], self.logits[last:]


def compute(
    builder: BatchBuilder, runner: ModelRunner, chunks: Sequence[ScheduledChunk], *, eager: bool = False
) -> Computed:
    """Run ``chunks``, at least one, whose blocks have memory. ``eager``: use no graph.

    Raises:
        torch.OutOfMemoryError: there is no room even for a single token.
    """
    try:
        return _whole(builder, runner, chunks, eager)
    except torch.OutOfMemoryError:
        pass
    # This is not in the handler, because its traceback would keep the tensors that the failed step has made.
    parts = _in_parts(builder, runner, chunks)
    fitting = max(num_tokens for num_tokens, _ in parts)
    results = [computed for _, computed in parts]
    divided = [computed.divide() for computed in results]
    return Computed(
        torch.cat([rows for kind in zip(*divided, strict=True) for rows in kind]),
        tuple(request for computed in results for request in computed.sample_requests),
        tuple(rows for computed in results for rows in computed.prompt_rows),
        tuple(request for computed in results for request in computed.ends),
        fitting,
    )


def _in_parts(
    builder: BatchBuilder, runner: ModelRunner, chunks: Sequence[ScheduledChunk]
) -> list[tuple[int, Computed]]:
    """Return (tokens, result) of each part."""
    done: list[tuple[int, Computed]] = []
    left = [*reversed(_halves(chunks))]  # parts still to compute, the next one last
    while left:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # frees memory that torch keeps in sizes that are not needed now
        part = left.pop()
        try:
            done.append((_num_tokens(part), _whole(builder, runner, part, eager=True)))
        except torch.OutOfMemoryError:
            left += reversed(_halves(part))
    return done


def _whole(builder: BatchBuilder, runner: ModelRunner, chunks: Sequence[ScheduledChunk], eager: bool) -> Computed:
    batch: Batch = builder.build(Schedule(chunks, (), ()))
    return Computed(runner.run(batch, eager=eager), batch.sample_requests, batch.prompt_rows, batch.ends)


def _halves(chunks: Sequence[ScheduledChunk]) -> tuple[list[ScheduledChunk], list[ScheduledChunk]]:
    """Return two parts with as many tokens each; the chunk in the middle is divided.

    Raises:
        torch.OutOfMemoryError: the chunks are a single token, which can't be divided.
    """
    room = _num_tokens(chunks) // 2  # tokens of the first part
    if not room:
        raise torch.OutOfMemoryError("no memory for a step of one token")
    first: list[ScheduledChunk] = []
    second: list[ScheduledChunk] = []
    for request, start, num_tokens, samples in chunks:
        here = min(num_tokens, room)
        room -= here
        if here:
            first.append(ScheduledChunk(request, start, here, samples if here == num_tokens else ()))
        if here < num_tokens:
            second.append(ScheduledChunk(request, start + here, num_tokens - here, samples))
    return first, second


def _num_tokens(chunks: Sequence[ScheduledChunk]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)

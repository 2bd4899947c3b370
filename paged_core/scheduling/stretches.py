"""Steps that can be predicted, because every running request decodes and none starts or ends: one step, or a stretch of
them.

A caller that computes ahead of the last step's tokens repeats that step. A simulator, which computes no model, takes a
stretch of steps at once. The result, block ids and the order of evictions included, is the same as that of single
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Schedule, ScheduledChunk


class Stretch(NamedTuple):
    """Steps in each of which each of the requests gets one token. None of them ends before the last step."""

    requests: Sequence[Request]  # all running requests
    num_steps: int  # at most
    num_context: int  # tokens whose K/V the first step reads; each later step reads one more for each request


def repeat(schedule: Schedule, running: Sequence[Request], pool: BlockPool) -> list[ScheduledChunk]:
    """Return the chunks of the step after ``schedule``, before its tokens are known, and take the blocks for them: one
    more token for each request that can't have reached its length. Returns no chunks if the step can't be predicted:
    not all requests sample, others are to be served, or no blocks are spare."""
    if sum(not request.held for request in running) != len(schedule.chunks):
        return []
    chunks, without_block = [], []
    for request, start, num_tokens, samples in schedule.chunks:
        position = start + num_tokens
        if samples != (request,) or request.group.lockstep:
            return []
        if position + 1 >= request.max_total:
            continue
        if position == len(request.block_table) * pool.block_size:
            # All others write to their last block in ``schedule``, so that block is their own.
            without_block.append((request, position))
        chunks.append(ScheduledChunk(request, position, 1, samples))
    if pool.num_available < len(without_block):
        return []
    for request, position in without_block:
        request.block_table.extend(pool, position, 1)
    return chunks


def find(running: Sequence[Request], pool: BlockPool, most: int) -> Stretch | None:
    """Return the next ``most`` steps, or fewer if a request ends or blocks might run out before. Returns None if that
    is so in the next step, or if a request does anything but continue from the token that the last step gave it."""
    if not running:
        return None
    most, num_context = min(most, pool.num_available // len(running) * pool.block_size - 1), 0
    for request in running:
        num_tokens = len(request.tokens)
        if request.num_computed + 1 != num_tokens or request.held or request.stop_token_ids:
            return None
        if num_tokens <= request.num_prompt or num_tokens <= request.num_recomputed_to:
            return None  # one token of its prompt, or of what it lost, is still to be computed
        if len(request.group.members) != 1:
            return None  # its last block may be shared
        most = min(most, request.max_total - num_tokens)
        num_context += num_tokens
    return Stretch(running, most, num_context) if most > 0 else None


def walk(
    stretch: Stretch, num_steps: int, token: int, pool: BlockPool, publish: Callable[[Request, int], None]
) -> None:
    """Take the first ``num_steps`` of a stretch: each request gets ``token`` in each of them. Blocks are published and
    taken in the order in which single steps would do it."""
    size, tokens = pool.block_size, [token] * num_steps
    boundaries: list[
        tuple[int, bool, int, int]
    ] = []  # (before which step, whether a block is taken (else published), whose block, its index)
    for i, request in enumerate(stretch.requests):
        request.tokens += tokens
        start = request.num_computed
        request.num_computed += num_steps
        step = -start % size  # before this step, the first of the request's new blocks is full
        while step <= num_steps:
            if step > 0:
                boundaries.append((step, False, i, start + step))
            if step < num_steps:
                boundaries.append((step, True, i, start + step))
            step += size
    boundaries.sort()
    for _, takes, i, position in boundaries:
        request = stretch.requests[i]
        if takes:
            request.block_table.extend(pool, position, 1)
        elif position // size > request.num_published:
            publish(request, position)

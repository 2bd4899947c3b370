"""Steps that can be foretold, since every running request decodes and nobody comes or goes: the next one, or a stretch.

Who computes ahead of the last step's tokens repeats that step. Who computes no model (a simulator) takes a stretch of
steps at once. What comes of it, block ids and the order of evictions included, is what the steps one by one come to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Schedule, ScheduledChunk


class Stretch(NamedTuple):
    """In each of its steps each of the requests gets one token; none of them ends before the last step."""

    requests: Sequence[Request]  # all that run
    num_steps: int  # at most
    num_context: int  # tokens whose K/V the first step reads; each later one reads a token more for each request


def repeat(schedule: Schedule, running: Sequence[Request], pool: BlockPool) -> list[ScheduledChunk]:
    """The chunks of the step after ``schedule``, before anybody knows its tokens: one token more for each request that
    can't have reached its length. Takes the blocks for them. None at all: it can't be told. Not all of them sample,
    others are to be served, or there are no blocks to spare."""
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
            without_block.append((request, position))  # else its last block is its own: ``schedule`` writes to it
        chunks.append(ScheduledChunk(request, position, 1, samples))
    if pool.num_available < len(without_block):
        return []
    for request, position in without_block:
        request.block_table.extend(pool, position, 1)
    return chunks


def find(running: Sequence[Request], pool: BlockPool, most: int) -> Stretch | None:
    """The next ``most`` steps, or as many as there are until a request ends, or blocks might run out. None: that is so
    at once, or a request does anything but go on from a token that it was given in the step before."""
    if not running:
        return None
    most, num_context = min(most, pool.num_available // len(running) * pool.block_size - 1), 0
    for request in running:
        num_tokens = len(request.tokens)
        if request.num_computed + 1 != num_tokens or request.held or request.stop_token_ids:
            return None
        if num_tokens <= request.num_prompt or num_tokens <= request.num_recomputed_to:
            return None  # one token of its prompt, or of what it lost, was left for this step
        if len(request.group.members) != 1:
            return None  # it may share its last block
        most = min(most, request.max_total - num_tokens)
        num_context += num_tokens
    return Stretch(running, most, num_context) if most > 0 else None


def walk(
    stretch: Stretch, num_steps: int, token: int, pool: BlockPool, publish: Callable[[Request, int], None]
) -> None:
    """Compute the first ``num_steps`` of a stretch: each request gets ``token`` in each of them. Blocks are published
    and taken in the order in which the steps would do it."""
    size, tokens = pool.block_size, [token] * num_steps
    boundaries: list[
        tuple[int, bool, int, int]
    ] = []  # (before which step, whether a block is taken there, whose, where)
    for i, request in enumerate(stretch.requests):
        request.tokens += tokens
        start = request.num_computed
        request.num_computed += num_steps
        step = -start % size  # before which the first of its blocks is full
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

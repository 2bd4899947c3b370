"""Requests that go on from another's tokens: samples of one prompt, and beams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.request import Request


def fork(pool: BlockPool, leader: Request, siblings: Iterable[Request]) -> None:
    """They start from what the leader has computed of their common prompt, the partly filled last block included."""
    for sibling in siblings:
        sibling.block_table.replace(pool, leader.block_table.share(pool))
        sibling.digests = list(leader.digests)
        sibling.num_computed = sibling.num_cached = leader.num_computed
        sibling.num_published = leader.num_published


def continue_from_parents(pool: BlockPool, rows: Sequence[Request], parents: Sequence[int]) -> None:
    """A beam step: each row goes on from its parent's tokens and blocks, which they then share."""
    moved = [(row, rows[parent]) for row, parent in zip(rows, parents, strict=True) if rows[parent] is not row]
    # All are shared before the first is given back: a table may be somebody's parent and somebody's child.
    states = [
        (list(p.tokens), p.block_table.share(pool), list(p.digests), p.num_computed, p.num_published) for _, p in moved
    ]
    for (row, _), (tokens, blocks, digests, num_computed, num_published) in zip(moved, states, strict=True):
        row.block_table.replace(pool, blocks)
        row.tokens, row.digests = tokens, digests
        row.num_computed, row.num_published = num_computed, num_published

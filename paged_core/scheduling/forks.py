"""Requests that continue another request's tokens: samples of one prompt, and beams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.request import Request


def fork(pool: BlockPool, leader: Request, siblings: Iterable[Request]) -> None:
    """Let ``siblings`` start from what the leader has computed of their common prompt, the partly filled last block
    included."""
    for sibling in siblings:
        sibling.block_table.replace(pool, leader.block_table.share(pool))
        sibling.digests = list(leader.digests)
        sibling.num_computed = sibling.num_cached = leader.num_computed
        sibling.num_published = leader.num_published


def continue_from_parents(pool: BlockPool, rows: Sequence[Request], parents: Sequence[int]) -> None:
    """Carry out a beam step: each row continues its parent's tokens, and shares its parent's blocks."""
    moved = [(row, rows[parent]) for row, parent in zip(rows, parents, strict=True) if rows[parent] is not row]
    # All tables are shared before the first is released, because a row may be a parent and continue another one too.
    states = [
        (list(p.tokens), p.block_table.share(pool), list(p.digests), p.num_computed, p.num_published) for _, p in moved
    ]
    for (row, _), (tokens, blocks, digests, num_computed, num_published) in zip(moved, states, strict=True):
        row.block_table.replace(pool, blocks)
        row.tokens, row.digests = tokens, digests
        row.num_computed, row.num_published = num_computed, num_published

"""What becomes of a request's block table while it runs: it grows, copies on write, forks, and ends behind a window.

Knows one request and the pool; that there are blocks enough has been seen to before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import BlockMove


def has_slot(pool: BlockPool, request: Request) -> bool:
    """Whether the next token fits into the last block as it stands: so it does in nearly all steps of a decode."""
    block, offset = divmod(request.num_computed, pool.block_size)
    return offset > 0 and not pool.is_shared(request.block_table[block])


def num_blocks_needed(pool: BlockPool, request: Request, num_tokens: int) -> int:
    """Blocks that its next ``num_tokens`` tokens take: new ones, and one for the last block if others share it."""
    last = (request.num_computed + num_tokens - 1) // pool.block_size
    return last + 1 - len(request.block_table) + _copies(pool, request)


def extend(pool: BlockPool, request: Request, num_tokens: int) -> list[BlockMove]:
    """Give it blocks for its next tokens. What comes back is to be copied before they are written."""
    table, moves = request.block_table, []
    last = (request.num_computed + num_tokens - 1) // pool.block_size
    if _copies(pool, request):
        first = request.num_computed // pool.block_size
        source, target = table[first], pool.allocate()
        pool.release((source,))
        table[first] = target
        request.table_version += 1
        moves.append(BlockMove(source, target))
    while len(table) <= last:
        table.append(pool.allocate())
    return moves


def give_back_behind_window(pool: BlockPool, request: Request, window: int) -> None:
    """Free the blocks that no later query can see, in a model whose layers all have a sliding window."""
    table = request.block_table
    i = min((request.num_computed + 1 - window) // pool.block_size, len(table)) - 1
    while i >= 0 and table[i] != NULL_BLOCK:
        pool.release((table[i],))
        table[i] = NULL_BLOCK
        request.table_version += 1
        i -= 1


def fork(pool: BlockPool, leader: Request, siblings: Iterable[Request]) -> None:
    """They start from what the leader has computed of their common prompt, the partly filled last block included."""
    for sibling in siblings:
        pool.share(leader.block_table)
        sibling.block_table = list(leader.block_table)
        sibling.table_version += 1
        sibling.digests = list(leader.digests)
        sibling.num_computed = sibling.num_cached = leader.num_computed
        sibling.num_published = leader.num_published


def continue_from_parents(pool: BlockPool, rows: Sequence[Request], parents: Sequence[int]) -> None:
    """A beam step: each row goes on from its parent's tokens and blocks, which they then share."""
    moved = [(row, rows[parent]) for row, parent in zip(rows, parents, strict=True) if rows[parent] is not row]
    states = [(list(p.tokens), list(p.block_table), list(p.digests), p.num_computed, p.num_published) for _, p in moved]
    for _, table, *_ in states:
        pool.share(table)  # all before the first release: a table may be somebody's parent and somebody's child
    for (row, _), (tokens, table, digests, num_computed, num_published) in zip(moved, states, strict=True):
        pool.release(row.block_table)
        row.tokens, row.block_table, row.digests = tokens, table, digests
        row.num_computed, row.num_published = num_computed, num_published
        row.table_version += 1


def _copies(pool: BlockPool, request: Request) -> bool:
    """Whether its next token goes into a block that others read too."""
    first, offset = divmod(request.num_computed, pool.block_size)
    return offset > 0 and pool.is_shared(request.block_table[first])

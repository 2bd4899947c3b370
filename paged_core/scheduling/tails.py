"""Tails: requests that compute their first tokens while a tier loads their last blocks.

The tier loads them from the end on, and the two meet somewhere (Cake: Jin et al., arXiv 2410.03065). Such a request
runs like any other: it has a seat, blocks for all its tokens, and chunks that end where loaded blocks begin. This file
knows which blocks of the request have come. It does not know what decides that, nor where they come from.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from paged_core.scheduling.block_pool import BlockContent, BlockPool
from paged_core.scheduling.prefixes import Found, Prefixes, Stored
from paged_core.scheduling.request import Request
from paged_core.scheduling.roster import Roster
from paged_core.scheduling.schedule import Load


class _Tail:
    """The blocks that one request waits for while it computes."""

    def __init__(self, load: Load, num_tokens: int, there: Collection[int]) -> None:
        self.load = load
        self.num_tokens = num_tokens  # that the request will have once all blocks have come
        self.there = set(there)  # blocks that hold their K/V, without those that the request has computed
        self.coming = True  # whether a tier is still loading


class Tails:
    """Begins such loads, and ends each of them once: the request meets its tail, or the load is abandoned."""

    def __init__(self, roster: Roster, prefixes: Prefixes, pool: BlockPool, stored: Stored | None) -> None:
        self._of: dict[Request, _Tail] = {}
        self._roster = roster
        self._prefixes = prefixes
        self._pool = pool
        self._stored = stored

    def __bool__(self) -> bool:
        return bool(self._of)

    @property
    def loads(self) -> list[Load]:
        """The loads that a tier has not finished."""
        return [tail.load for tail in self._of.values() if tail.coming]

    def begin(self, row: Request, found: Found) -> Load:
        """Let a request run that has taken the blocks of ``found`` in the cache, while a tier loads the rest, last
        block first."""
        coming: dict[bytes, BlockContent] = {}
        num_tokens = self._prefixes.load(row, found, coming)
        load = Load(tuple(reversed(coming.values())), num_tokens - row.num_computed, beside=True)
        self._of[row] = _Tail(load, num_tokens, [block for block in found if block is not None])
        self._roster.start(row)
        return load

    def chunk(self, row: Request, num_tokens: int) -> int:
        """Return how many of the request's next ``num_tokens`` tokens to compute in one step: up to the first block
        that has come, and while blocks are coming, up to where the two should meet."""
        tail = self._of.get(row)
        if tail is None:
            return num_tokens
        size, first = self._pool.block_size, row.num_computed // self._pool.block_size
        stop = next((i for i, block in enumerate(row.block_table) if i > first and block in tail.there), None)
        gap = (tail.num_tokens if stop is None else stop * size) - row.num_computed
        if tail.coming and self._stored is not None:
            meeting = row.num_computed + self._stored.num_to_compute(-(-gap // size), gap)
            gap = min(gap, -(-max(meeting, row.num_computed + 1) // size) * size - row.num_computed)
        return min(gap, num_tokens)

    def lacking(self, load: Load) -> set[int]:
        """Return the blocks of a load that are still wanted: the request has not computed them, and they have not
        come."""
        for row, tail in self._of.items():
            if tail.load is load:
                return set(row.block_table[row.num_computed // self._pool.block_size :]) - tail.there
        return set()

    def arrived(self, load: Load, blocks: Collection[int]) -> None:
        """Note that these blocks have come."""
        for row, tail in list(self._of.items()):
            if tail.load is load:
                tail.there |= set(blocks)
                self.advance(row)

    def advance(self, row: Request) -> None:
        """Let the request continue behind blocks that have come. Call this whenever it has computed tokens."""
        tail = self._of.get(row)
        if tail is None:
            return
        size, num_tokens = self._pool.block_size, row.num_computed
        while num_tokens < tail.num_tokens and row.block_table[num_tokens // size] in tail.there:
            num_tokens = min((num_tokens // size + 1) * size, tail.num_tokens)
        self._prefixes.skip(row, num_tokens)
        if num_tokens >= tail.num_tokens or not (tail.coming or self._ahead(row, tail)):
            tail.load.met = True
            del self._of[row]

    def land(self, load: Load) -> None:
        """Note that no more blocks of the load will come. The request computes those that have not."""
        for row, tail in list(self._of.items()):
            if tail.load is load:
                tail.coming = False
                self.advance(row)

    def abandon(self, rows: Sequence[Request]) -> None:
        """End the tails of requests that are about to release their blocks, or whose loaded blocks belong to a model
        that has changed."""
        for row in rows:
            tail = self._of.pop(row, None)
            if tail is not None:
                tail.load.abandoned = True
                row.block_table.shorten(self._pool, -(-row.num_computed // self._pool.block_size))

    def abandon_all(self) -> None:
        self.abandon(list(self._of))

    def check(self) -> None:
        size = self._pool.block_size
        for row, tail in self._of.items():
            assert row in self._roster.running, "a tail of who does not run"
            assert row.num_computed < tail.num_tokens <= len(row.block_table) * size
            assert row.block_table[row.num_computed // size] not in tail.there

    def _ahead(self, row: Request, tail: _Tail) -> bool:
        """Return whether blocks have come that the request has not reached yet."""
        return not tail.there.isdisjoint(row.block_table[row.num_computed // self._pool.block_size :])

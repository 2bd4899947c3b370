"""Loading: requests whose blocks a tier is loading. They have seats and blocks, and steps go on without them.

This file knows which request waits for which load. It does not know where the blocks come from, nor how long that
takes: its owner says when a load is over.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from paged_core.scheduling.block_pool import BlockContent, BlockPool
from paged_core.scheduling.prefixes import Found, Prefixes
from paged_core.scheduling.request import Request
from paged_core.scheduling.roster import Roster
from paged_core.scheduling.schedule import Load


class Loading:
    """Begins loads, and ends each of them once: as landed or as abandoned."""

    def __init__(self, roster: Roster, prefixes: Prefixes, pool: BlockPool) -> None:
        self.begun: list[Load] = []  # not yet in a schedule
        self._under_way: dict[Load, dict[Request, int]] = {}  # load -> the tokens that each of its requests will have
        self._roster = roster
        self._prefixes = prefixes
        self._pool = pool

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, rows: Sequence[Request], found: Sequence[Found]) -> None:
        """Let ``rows``, which hold the blocks of ``found`` that are in the cache, wait for those that a tier holds."""
        coming: dict[bytes, BlockContent] = {}
        num_tokens = {row: self._prefixes.load(row, blocks, coming) for row, blocks in zip(rows, found, strict=True)}
        num_saved = sum(num_tokens[row] - row.num_computed for row in rows)
        load = Load(tuple(coming.values()), num_saved)
        for row in rows:
            self._roster.load(row)
        self._under_way[load] = num_tokens
        self.begun.append(load)

    def land(self, load: Load, lost: Collection[int]) -> None:
        """End a load whose blocks have come, except those ``lost``, and let its requests run. Does nothing if it was
        abandoned."""
        for row, num_tokens in self._under_way.pop(load, {}).items():
            self._prefixes.loaded(row, num_tokens, lost)
            self._roster.start(row)

    def abandon(self, load: Load) -> list[Request]:
        """Give up a load, because its blocks are needed or nothing waits for them. Returns its requests; the caller
        releases them."""
        load.abandoned = True
        if load in self.begun:
            self.begun.remove(load)
        return list(self._under_way.pop(load))

    def lacking(self, load: Load) -> set[int]:
        """Return the blocks of a load whose K/V are still wanted: all of them, as long as a request waits for it."""
        return {content.block for content in load.contents} if load in self._under_way else set()

    def last(self) -> Load | None:
        """Return the load of the last request in the policy's order, or None."""
        return self.of(self._roster.loading[-1]) if self._under_way else None

    def of(self, request: Request) -> Load:
        return next(load for load, rows in self._under_way.items() if request in rows)

    def all(self) -> list[Load]:
        return list(self._under_way)

    def check(self) -> None:
        loading = [row for rows in self._under_way.values() for row in rows]
        assert sorted(map(id, loading)) == sorted(map(id, self._roster.loading)), "who loads is not who waits for it"

"""Admission: which waiting requests start in this step.

This file knows seats (of max_num_seqs) and blocks: how many waiting requests need, and how many running ones still
need. A running request is never preempted to admit a waiting one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.capacity import max_blocks_at_once
from paged_core.scheduling.loading import Loading
from paged_core.scheduling.prefixes import Found, Prefixes
from paged_core.scheduling.request import Request
from paged_core.scheduling.roster import Roster, lockstep_rows
from paged_core.scheduling.schedule import Limits
from paged_core.scheduling.tails import Tails


class Admission:
    """Starts requests in their order, as long as there is room."""

    def __init__(
        self,
        roster: Roster,
        prefixes: Prefixes,
        loading: Loading,
        tails: Tails,
        pool: BlockPool,
        limits: Limits,
    ) -> None:
        self._roster = roster
        self._prefixes = prefixes
        self._loading = loading
        self._tails = tails
        self._pool = pool
        self._limits = limits
        self._max_blocks_at_once = max_blocks_at_once(limits, pool.block_size)

    def start_those_that_fit(self) -> Iterator[Sequence[Request]]:
        """Yield each request that runs from now on, or the rows of a lockstep group. The caller gives them the blocks
        of this step before it asks for the next. Requests whose blocks a tier loads get seats here, and are not
        yielded."""
        roster = self._roster
        num_seats = roster.num_seats
        # Running requests that lack one token need no promise: they have got this step's slot already.
        behind = _behind(roster.running)
        promised = sum(self._blocks_lacking(request) for request in (*behind, *roster.loading))
        i = 0
        while i < min(len(roster.waiting), self._limits.max_num_seqs):
            head = roster.waiting[i]
            rows = lockstep_rows(head) if head.group.lockstep else [head]
            if head.held:
                i += len(rows)
                continue
            beside = not behind and self._computes_alone(rows)
            found = [self._prefixes.lookup(row, beside=beside) for row in rows]
            if any(self._prefixes.comes_soon(row, blocks) for row, blocks in zip(rows, found, strict=True)):
                i += len(rows)  # it shares a block that is being computed now: waiting costs less
                continue
            num_seats += sum(len(roster.samples(row)) for row in rows)
            needed = sum(self._blocks_to_start(row, blocks) for row, blocks in zip(rows, found, strict=True))
            reserve = self._limits.watermark_blocks if roster.running or roster.loading else 0
            if num_seats > self._limits.max_num_seqs or self._pool.num_available - promised - needed < reserve:
                return
            for row, blocks in zip(rows, found, strict=True):
                self._prefixes.take(row, blocks)
            if beside and self._prefixes.meets(rows[0], found[0]):
                self._loading.begun.append(self._tails.begin(rows[0], found[0]))
                yield rows
            elif any(None in blocks for blocks in found):
                self._loading.begin(rows, found)
            else:
                for row in rows:
                    roster.start(row)
                yield rows
            behind += _behind(rows)
            promised += sum(self._blocks_lacking(row) for row in rows)

    def _computes_alone(self, rows: Sequence[Request]) -> bool:
        """Return whether no other request wants the step's tokens that this one would compute beside a load."""
        return len(rows) == len(self._roster.waiting) == 1 and not rows[0].group.lockstep

    def _blocks_to_start(self, request: Request, found: Found) -> int:
        """Return how many available blocks a waiting request takes: new ones, and found ones that no request uses."""
        here = [block for block in found if block is not None]
        new = -(-len(request.tokens) // self._pool.block_size) - len(here)
        return min(new + self._pool.num_unused(here), self._max_blocks_at_once)

    def _blocks_lacking(self, request: Request) -> int:
        """Return how many more blocks the known tokens of a request will take."""
        lacking = -(-len(request.tokens) // self._pool.block_size) - len(request.block_table)
        return max(0, min(lacking, self._max_blocks_at_once))


def _behind(rows: Sequence[Request]) -> list[Request]:
    """Return the rows that lack more than one token: a part of their prompt, or of what they lost when preempted."""
    return [row for row in rows if len(row.tokens) - row.num_computed > 1]

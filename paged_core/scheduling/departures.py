"""Departures: how requests give up their blocks: at their end, when preempted, or when a tier's load is given up.

This file knows how blocks are released, and not why: nothing of budgets, and nothing of selected tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paged_core.scheduling import forks
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.loading import Loading
from paged_core.scheduling.prefixes import Prefixes
from paged_core.scheduling.request import FinishReason, Request, RequestOutput, RequestStatus
from paged_core.scheduling.roster import Roster, lockstep_rows
from paged_core.scheduling.schedule import Load
from paged_core.scheduling.tails import Tails


class Departures:
    """Releases all blocks of requests that leave, and lets no other request wait for those blocks any more."""

    def __init__(self, roster: Roster, prefixes: Prefixes, loading: Loading, tails: Tails, pool: BlockPool) -> None:
        self.num_preemptions = 0
        self._roster = roster
        self._prefixes = prefixes
        self._loading = loading
        self._tails = tails
        self._pool = pool

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        if request.status is RequestStatus.LOADING:
            self.abandon(self._loading.of(request))
        first_fork = self._roster.end(request)
        if first_fork is not None:
            # the fork continues from what the ended request has computed of their prompt
            forks.fork(self._pool, request, (first_fork,))
        self._release(request)
        request.finish_reason = reason
        request.error = error

    def fail(self, request: Request, error: str) -> Iterator[RequestOutput]:
        """End a request, and with it all rows of its lockstep group."""
        rows = request.group.members if request.group.lockstep else (request,)
        for row in [row for row in rows if not row.finished]:
            self.end(row, FinishReason.ERROR, error)
            yield RequestOutput(row, (), None, FinishReason.ERROR, error)

    def preempt(self, request: Request) -> Sequence[Request]:
        """Take the blocks of a request, or of its whole lockstep group. It will compute its tokens again, or load them:
        its full blocks stay findable, and go to a tier when the cache evicts them. Returns the preempted requests.

        Preemption happens here only.
        """
        rows = lockstep_rows(request) if request.group.lockstep else (request,)
        for row in rows:
            self._prefixes.swap_out(row)
            self._release(row)
            row.num_recomputed_to = len(row.tokens)
            self._roster.send_back(row)
            self.num_preemptions += 1
        return rows

    def abandon(self, load: Load) -> None:
        """Give up a load. Its requests lose their blocks and wait for their turn again."""
        for row in self._loading.abandon(load):
            self._release(row)
            self._roster.send_back(row)

    def _release(self, request: Request) -> None:
        self._tails.abandon((request,))
        request.block_table.shorten(self._pool, 0)
        self._prefixes.abandon(request)
        request.num_computed = request.num_published = 0

"""ScheduleBuilder: who gets how many tokens of a step's budget, and the blocks for them.

This file knows one step. Admission decides which requests may start, Departures how a preempted request leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from paged_core.scheduling.admission import Admission
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.block_table import BlockMove
from paged_core.scheduling.departures import Departures
from paged_core.scheduling.loading import Loading
from paged_core.scheduling.request import Request
from paged_core.scheduling.roster import Roster, lockstep_rows
from paged_core.scheduling.schedule import Limits, Schedule, ScheduledChunk
from paged_core.scheduling.tails import Tails


class ScheduleBuilder:
    """Builds one schedule after another: running requests first, then as many waiting ones as fit."""

    def __init__(
        self, roster: Roster, departures: Departures, loading: Loading, tails: Tails, pool: BlockPool, limits: Limits
    ) -> None:
        self._roster = roster
        self._departures = departures
        self._loading = loading
        self._tails = tails
        self._pool = pool
        self._limits = limits
        self._begin(0)

    def build(self, budget: int, admission: Admission) -> Schedule:
        """Return a Schedule that gives out ``budget`` tokens."""
        self._begin(budget)
        self._serve_running()
        running = self._roster.running
        while not self._chunks and not all(request.held for request in running):
            # No running request could get a block, since those behind it have made no progress since they were
            # preempted. Preempt the last one all the same.
            self._preempt(running[-1])
            self._serve_running()
        if self._roster.waiting and not self._preempted and self._budget > 0:
            self._admit(admission)
        schedule = Schedule(self._chunks, self._moves, self._preempted)
        self._begin(0)  # the builder keeps no reference to a request between steps
        return schedule

    def _begin(self, budget: int) -> None:
        self._chunks: list[ScheduledChunk] = []
        self._moves: list[BlockMove] = []
        self._preempted: list[Request] = []
        self._budget = budget
        self._admitting = False  # while waiting requests start, no running one is preempted
        self._num_to_serve = 0  # running requests that have not been served yet in this step

    def _serve_running(self) -> None:
        running = self._roster.running
        self._num_to_serve = len(running)
        i = 0
        while i < len(running):  # the list gets shorter at its end while requests are preempted
            request = running[i]
            if request.group.lockstep:
                rows = lockstep_rows(request)
                i += len(rows)
                self._num_to_serve -= len(rows)
                if not request.held:
                    self._serve(rows)
                continue
            i += 1
            self._num_to_serve -= 1
            if request.held:
                continue
            start = request.num_computed
            if len(request.tokens) - start > 1:
                self._serve((request,))
            elif request.block_table.has_slot(self._pool, start) or self._make_room(request, 1, (request,)):
                self._budget -= 1
                self._chunks.append(ScheduledChunk(request, start, 1, self._roster.samples(request)))

    def _admit(self, admission: Admission) -> None:
        self._admitting = True
        for rows in admission.start_those_that_fit():
            self._serve(rows)
            if self._budget <= 0:
                return

    def _serve(self, rows: Sequence[Request]) -> None:
        """Give one request, or the rows of one lockstep group, their tokens. Either all rows sample or none does."""
        shares = self._shares(rows)
        for row, num_tokens in zip(rows, shares, strict=True):
            if num_tokens and not self._make_room(row, num_tokens, rows):
                return
        for row, num_tokens in zip(rows, shares, strict=True):
            if num_tokens:
                self._emit(row, num_tokens)

    def _shares(self, rows: Sequence[Request]) -> list[int]:
        """Return how many tokens each row computes in this step."""
        lacks = [len(row.tokens) - row.num_computed for row in rows]
        if self._tails:
            lacks = [self._tails.chunk(row, lack) for row, lack in zip(rows, lacks, strict=True)]
        # One token of the budget is reserved for each running request that is still to be served.
        budget = self._budget - self._num_to_serve
        if len(rows) > 1 and sum(lacks) > budget:
            lacks = [lack - 1 for lack in lacks]  # no row may sample before all rows can
        shares = []
        for row, lack in zip(rows, lacks, strict=True):
            share = min(lack, budget)
            if row.wants_prompt_logprobs:
                share = min(share, self._limits.max_prompt_logprob_rows)
            shares.append(share)
            budget -= share
        if len(rows) > 1 and any(
            row.num_computed + share < len(row.tokens) for row, share in zip(rows, shares, strict=True)
        ):
            return [min(share, len(row.tokens) - row.num_computed - 1) for row, share in zip(rows, shares, strict=True)]
        return shares

    def _emit(self, request: Request, num_tokens: int) -> None:
        start = request.num_computed
        samples: tuple[Request, ...] = ()
        if start + num_tokens == len(request.tokens):
            samples = self._roster.samples(request)
        self._budget -= num_tokens
        self._chunks.append(ScheduledChunk(request, start, num_tokens, samples))

    def _make_room(self, request: Request, num_tokens: int, rows: Sequence[Request]) -> bool:
        """Take blocks for the next ``num_tokens`` tokens; a shared last block is copied on write. Returns False if
        there are none."""
        # The lack is counted anew after each preemption: a last block that only the victim shared needs no copy any
        # more.
        while self._pool.num_available < request.block_table.num_lacking(self._pool, request.num_computed, num_tokens):
            if self._admitting:
                return False
            load = self._loading.last()
            if load is not None:  # preferred as the victim: it has computed nothing that would be lost
                self._departures.abandon(load)
                continue
            victim = self._victim(rows)
            if victim is None:
                return False
            self._preempt(victim)
        self._moves += request.block_table.extend(self._pool, request.num_computed, num_tokens)
        return True

    def _victim(self, rows: Sequence[Request]) -> Request | None:
        """Return the last running request behind ``rows`` that has made progress since its last preemption, or None."""
        last = rows[-1]
        for request in reversed(self._roster.running):
            if request is last:
                break
            if len(request.tokens) > request.num_recomputed_to:
                return request
        return None

    def _preempt(self, request: Request) -> None:
        self._preempted += self._departures.preempt(request)

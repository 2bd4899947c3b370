"""Lookahead: begins the next step before the host knows the current step's tokens, so that the device need not wait.

While rows only decode, the integers of their next step don't depend on which tokens they get, and the tokens stay on
the device. If a row turns out to have ended, one token was computed in vain. Its K/V are in blocks that the row had,
and the blocks' next owner overwrites them. This file decides nothing: the Scheduler knows whether a step can be
repeated, and the selector whether it can choose without the host.
"""

from __future__ import annotations

from paged_core.engine.step_runner import Launched, StepRunner
from paged_core.execution.staging import take_rows
from paged_core.scheduling.scheduler import Scheduler


class Lookahead:
    """Holds the step that was begun early, if there is one."""

    def __init__(self, scheduler: Scheduler, steps: StepRunner) -> None:
        self._scheduler = scheduler
        self._steps = steps
        self._next: Launched | None = None

    def begin(self, now: Launched) -> None:
        """Begin the step after ``now``, whose results are not known yet, if that step can be predicted."""
        if now.chosen is None:
            return
        schedule = self._scheduler.repeat(now.schedule)
        if schedule is None:
            return
        row_of = {chunk.request: row for row, chunk in enumerate(now.schedule.chunks)}
        token_ids = take_rows(now.chosen.token_ids, [row_of[chunk.request] for chunk in schedule.chunks])
        self._next = self._steps.launch_ahead(schedule, token_ids)

    def forget(self) -> None:
        """Drop the step begun early, because the step before it failed."""
        self._next = None

    def take(self) -> Launched | None:
        """Return the step begun early, without rows that have ended since. None: there is none, or no row is left of
        it."""
        launched, self._next = self._next, None
        if launched is None:
            return None
        chunks, computed, chosen = launched.schedule.chunks, launched.computed, launched.chosen
        rows = [row for row, chunk in enumerate(chunks) if not chunk.request.finished]
        if not rows or chosen is None:
            return None
        alive = launched.schedule._replace(chunks=[chunks[row] for row in rows])
        requests = tuple(computed.sample_requests[row] for row in rows)
        return launched._replace(
            schedule=alive, computed=computed._replace(sample_requests=requests), chosen=chosen.keep(rows)
        )

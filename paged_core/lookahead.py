"""The step after the one under way, begun before the host knows its tokens: so the device need not wait for the host.

While rows only decode, the integers of their next step don't depend on which tokens they get: the tokens stay on the
device. A row that turns out to have ended has computed one token for nobody. What it wrote lies in blocks that it had;
whoever gets them next writes to them later. This file decides nothing: the Scheduler tells whether a step can be
repeated, and the sampler whether it can choose without the host.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from paged_core.execution.batch import BatchBuilder
from paged_core.execution.model import Chosen, ForesightedSelector, TokenSelector
from paged_core.execution.model_runner import ModelRunner
from paged_core.execution.parts import Computed
from paged_core.execution.staging import take_rows
from paged_core.scheduling.schedule import Schedule
from paged_core.scheduling.scheduler import Scheduler

_log = logging.getLogger("paged_core")


class Launched(NamedTuple):
    """A step that the device has been told of."""

    schedule: Schedule
    computed: Computed
    chosen: Chosen | None  # its tokens, on the device; None: they are chosen with the host's help


class Lookahead:
    """Holds the step that was begun ahead, if there is one."""

    def __init__(
        self, scheduler: Scheduler, builder: BatchBuilder, runner: ModelRunner, sampler: TokenSelector, enabled: bool
    ) -> None:
        self._scheduler = scheduler
        self._builder = builder
        self._runner = runner
        self._sampler = sampler
        self._enabled = enabled
        self._next: Launched | None = None

    def launched(self, schedule: Schedule, computed: Computed) -> Launched:
        """A step, its tokens being chosen on the device if they can be."""
        chosen, requests = None, computed.sample_requests
        if self._enabled and requests and not computed.prompt_rows:
            selector = requests[0].selector or self._sampler
            alike = all((request.selector or self._sampler) is selector for request in requests)
            if alike and isinstance(selector, ForesightedSelector) and _chooses_as_it_selects(type(selector)):
                try:
                    chosen = selector.choose(computed.logits, requests)
                except torch.AcceleratorError:
                    raise
                except Exception:  # then they are chosen in their turn, where failing selectors are looked after
                    _log.debug("tokens could not be chosen ahead", exc_info=True)
        return Launched(schedule, computed, chosen)

    def begin(self, now: Launched) -> None:
        """Begin the step after ``now``, whose results have not been taken in, if that step can be told."""
        if now.chosen is None:
            return
        schedule = self._scheduler.repeat(now.schedule)
        if schedule is None:
            return
        row_of = {chunk.request: row for row, chunk in enumerate(now.schedule.chunks)}
        token_ids = take_rows(now.chosen.token_ids, [row_of[chunk.request] for chunk in schedule.chunks])
        try:
            self._runner.grow(self._scheduler.pool.num_backed)
            batch = self._builder.build(schedule, token_ids)
            computed = Computed(self._runner.run(batch), batch.sample_requests, ())
        except torch.AcceleratorError:
            raise
        except Exception:  # then it is computed in its turn, where failing steps are looked after
            _log.debug("a step could not be begun ahead", exc_info=True)
            return
        self._next = self.launched(schedule, computed)

    def take(self) -> Launched | None:
        """The step that was begun, without rows that have ended since. None: none was, or nothing is left of it."""
        launched, self._next = self._next, None
        if launched is None:
            return None
        (chunks, moves, preempted), computed, chosen = launched
        rows = [row for row, chunk in enumerate(chunks) if not chunk.request.finished]
        if not rows or chosen is None:
            return None
        requests = tuple(computed.sample_requests[row] for row in rows)
        alive = Schedule([chunks[row] for row in rows], moves, preempted)
        return Launched(alive, Computed(computed.logits, requests, ()), chosen.keep(rows))


def _chooses_as_it_selects(kind: type) -> bool:
    """Whether ``choose`` was written by whoever wrote ``select`` last, or after: else it chooses something else."""
    for base in kind.__mro__:
        if "choose" in vars(base):
            return True
        if "select" in vars(base):
            return False
    return False

"""Runs one step: a Schedule in; its logits, then its tokens out.

Knows how a step may fail (memory runs out, the model raises, a selector raises) and what can be done about it within
that step. It ends no request: those on which the model failed are told to the Engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paged_core.engine.selection import OneByOne, PromptLogprobs, choose_rows, prompt_logprobs_of, select_rows
from paged_core.errors import EngineDeadError
from paged_core.execution.batch import BatchBuilder
from paged_core.execution.model import Chosen, TokenSelector
from paged_core.execution.model_runner import ModelRunner
from paged_core.execution.parts import Computed, compute
from paged_core.scheduling.request import Group, Selection
from paged_core.scheduling.schedule import Schedule, ScheduledChunk
from paged_core.scheduling.scheduler import Scheduler

_log = logging.getLogger("paged_core")


class Launched(NamedTuple):
    """A step that the device has been told of."""

    schedule: Schedule  # without the requests that failed
    computed: Computed
    chosen: Chosen | None  # its tokens, on the device; None: they are chosen with the host's help
    failed: Mapping[Group, str]  # requests on which the model raises, and why


class StepRunner:
    """Runs the steps of one engine.

    Args:
        ahead: let tokens be chosen on the device where they can be, so that the next step may begin before they are
            known.
    """

    def __init__(
        self, scheduler: Scheduler, builder: BatchBuilder, runner: ModelRunner, sampler: TokenSelector, *, ahead: bool
    ) -> None:
        self.num_divided = 0  # steps computed in parts
        self._scheduler = scheduler
        self._builder = builder
        self._runner = runner
        self._sampler = sampler
        self._ahead = ahead

    def launch(self, schedule: Schedule) -> Launched:
        """Compute a step.

        Raises:
            EngineDeadError: there is no memory for a single token, or the model fails whatever it is given.
            torch.AcceleratorError: the device has failed.
        """
        if not schedule.chunks:
            return Launched(schedule, _nothing(), None, {})
        self._grow(self._scheduler.pool.num_backed)
        self._runner.move_blocks(schedule.moves)
        failed: Mapping[Group, str] = {}
        try:
            computed = self._compute(schedule.chunks)
        except (EngineDeadError, torch.AcceleratorError):
            raise
        except Exception as error:
            schedule, computed, failed = self._without_culprits(schedule, error)
        return Launched(schedule, computed, self._choose(computed, num_unknown=0), failed)

    def launch_ahead(self, schedule: Schedule, token_ids: Tensor) -> Launched | None:
        """Compute a step of one token each, ``token_ids i64 [T]``, which only the device knows. None: it can't be
        computed now, and is in its turn, where failing steps are looked after.

        Raises:
            torch.AcceleratorError: the device has failed.
        """
        try:
            self._runner.grow(self._scheduler.pool.num_backed)
            batch = self._builder.build(schedule, token_ids)
            computed = Computed(self._runner.run(batch), batch.sample_requests, ())
        except torch.AcceleratorError:
            raise
        except Exception:
            _log.debug("a step could not be begun ahead", exc_info=True)
            return None
        return Launched(schedule, computed, self._choose(computed, num_unknown=1), {})

    def select(self, now: Launched) -> tuple[Selection, list[PromptLogprobs]]:
        """The step's tokens, and what was asked about prompts that it computed.

        Raises:
            EngineDeadError, torch.AcceleratorError: as for launch.
        """
        if now.chosen is not None:
            return now.chosen.fetch(), []
        try:
            return _select(self._sampler, now.computed)
        except torch.OutOfMemoryError:
            pass
        # Once more, with logits that nobody has written to and as little memory as can be.
        return _select(OneByOne(self._sampler), self._compute(now.schedule.chunks, eager=True))

    def _choose(self, computed: Computed, num_unknown: int) -> Chosen | None:
        if not self._ahead or computed.prompt_rows:
            return None
        return choose_rows(computed.logits, computed.sample_requests, self._sampler, num_unknown)

    def _compute(self, chunks: Sequence[ScheduledChunk], *, eager: bool = False) -> Computed:
        try:
            computed = compute(self._builder, self._runner, chunks, eager=eager)
        except torch.OutOfMemoryError as error:
            raise EngineDeadError(
                "no memory for a step of a single token; build one with a lower kv_cache_bytes"
            ) from error
        if computed.num_fitting is not None:
            self.num_divided += 1
            self._scheduler.shrink(computed.num_fitting)
            _log.warning("no memory for a step: computed in parts of at most %d tokens", computed.num_fitting)
        return computed

    def _grow(self, num_blocks: int) -> None:
        try:
            self._runner.grow(num_blocks)
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # what torch raises when memory runs out
            raise EngineDeadError(
                f"no memory for a K/V cache of {num_blocks} blocks; build one with a lower kv_cache_bytes"
            ) from error

    def _without_culprits(self, schedule: Schedule, error: Exception) -> tuple[Schedule, Computed, dict[Group, str]]:
        """The model raised: run each chunk alone, then those together whose group has not raised."""
        failed: dict[Group, str] = {}
        for chunk in schedule.chunks:
            if chunk.request.group in failed:
                continue
            try:
                self._compute([chunk], eager=True)
            except (EngineDeadError, torch.AcceleratorError):
                raise
            except Exception as own_error:
                failed[chunk.request.group] = f"the model failed on this request: {own_error!r}"
        sound = [chunk for chunk in schedule.chunks if chunk.request.group not in failed]
        remaining = Schedule(sound, (), schedule.preempted)
        if not sound:
            return remaining, _nothing(), failed
        try:
            return remaining, self._compute(sound, eager=True), failed
        except (EngineDeadError, torch.AcceleratorError):
            raise
        except Exception:  # sound alone, failing together: nobody's fault that we could tell
            raise EngineDeadError(f"the model fails on batches: {error!r}") from error


def _select(sampler: TokenSelector, computed: Computed) -> tuple[Selection, list[PromptLogprobs]]:
    logits, requests = computed.logits, computed.sample_requests
    told = prompt_logprobs_of(logits[len(requests) :], computed.prompt_rows, sampler)
    return select_rows(logits[: len(requests)], requests, sampler), told


def _nothing() -> Computed:
    return Computed(torch.empty(0, 0), (), ())

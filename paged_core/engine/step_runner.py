"""StepRunner: runs one step. A Schedule goes in; logits, then tokens come out.

This file knows how a step may fail (memory runs out, the model raises, a selector raises, logits are not finite) and
how to recover within that step. It ends no request: it reports those that failed to the Engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paged_core.engine.selection import (
    OneByOne,
    PromptLogprobs,
    choose_rows,
    fetch_rows,
    prompt_logprobs_of,
    select_rows,
)
from paged_core.errors import EngineDeadError
from paged_core.execution.batch import BatchBuilder
from paged_core.execution.finite import FiniteCheck
from paged_core.execution.model import Chosen, RequestSampler
from paged_core.execution.model_runner import ModelRunner
from paged_core.execution.parts import Computed, compute
from paged_core.interrupts import interrupts_the_process
from paged_core.scheduling.request import Group, Request, Selection
from paged_core.scheduling.schedule import Schedule, ScheduledChunk
from paged_core.scheduling.scheduler import Scheduler

_log = logging.getLogger("paged_core")


class Launched(NamedTuple):
    """A step whose work was given to the device."""

    schedule: Schedule  # without the requests that failed
    computed: Computed
    chosen: Chosen | None  # its tokens, on the device; None: choosing them needs the host
    finite: FiniteCheck  # of requests that have filled a block
    failed: Mapping[Group, str]  # requests with which the model raises -> error message


class Selected(NamedTuple):
    """The result of a step."""

    selection: Selection
    prompt_logprobs: Sequence[PromptLogprobs]
    not_finite: Collection[Request]  # their logits were not finite: nobody may find their blocks
    failed: Mapping[Group, str]  # requests whose prompt_logprobs failed -> error message


class StepRunner:
    """Runs the steps of one engine.

    Args:
        carry_out: moves blocks to and from tiers as a schedule says, before the step writes to its blocks.
        ahead: whether to choose tokens on the device if possible, so that the next step may begin before the host knows
            them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        builder: BatchBuilder,
        runner: ModelRunner,
        sampler: RequestSampler,
        carry_out: Callable[[Schedule], None],
        *,
        ahead: bool,
    ) -> None:
        self.num_divided = 0  # steps that were computed in parts
        self._scheduler = scheduler
        self._builder = builder
        self._runner = runner
        self._sampler = sampler
        self._carry_out = carry_out
        self._ahead = ahead

    def launch(self, schedule: Schedule) -> Launched:
        """Compute a step.

        Raises:
            EngineDeadError: there is no memory for a single token, or the model fails with any batch.
            torch.AcceleratorError: the device has failed.
        """
        self._carry_out(schedule)
        self._grow(self._scheduler.pool.num_backed)
        if not schedule.chunks:
            return self._launched(schedule, _nothing(), {})
        self._runner.move_blocks(schedule.moves)
        failed: Mapping[Group, str] = {}
        try:
            computed = self._compute(schedule.chunks)
        except BaseException as error:
            if _is_no_requests(error):
                raise
            schedule, computed, failed = self._without_culprits(schedule, error)
        return self._launched(schedule, computed, failed)

    def launch_ahead(self, schedule: Schedule, token_ids: Tensor) -> Launched | None:
        """Compute a step of one token per row, ``token_ids i64 [T]``, which only the device knows. Returns None if that
        fails; ``launch`` will compute the step again later, and handle the failure.

        Raises:
            torch.AcceleratorError: the device has failed.
        """
        try:
            self._carry_out(schedule)
            self._runner.grow(self._scheduler.pool.num_backed)
            batch = self._builder.build(schedule, token_ids)
            computed = Computed(self._runner.run(batch), batch.sample_requests, (), ())
        except BaseException as error:
            if _is_no_requests(error):
                raise
            _log.debug("a step could not be begun ahead", exc_info=True)
            return None
        return self._launched(schedule, computed, {}, num_unknown=1)

    def select(self, now: Launched) -> Selected:
        """Return the step's tokens, and the logprobs of prompts that it computed.

        Raises:
            EngineDeadError, torch.AcceleratorError: see launch.
        """
        if now.chosen is not None:
            computed = now.computed
            selection = fetch_rows(now.chosen, computed.sample_requests, computed.logits.shape[1])
            return Selected(selection, (), now.finite.failed(), {})
        try:
            return _select(self._sampler, now, again=True)
        except torch.OutOfMemoryError:
            pass
        # Compute the step again, to have logits that nothing has overwritten, with as little memory as possible.
        computed = self._compute(now.schedule.chunks, eager=True)
        once_more = now._replace(computed=computed, finite=self._look(now.schedule, computed))
        return _select(OneByOne(self._sampler), once_more, again=False)

    def _launched(
        self, schedule: Schedule, computed: Computed, failed: Mapping[Group, str], num_unknown: int = 0
    ) -> Launched:
        chosen = self._choose(computed, num_unknown)
        return Launched(schedule, computed, chosen, self._look(schedule, computed), failed)

    def _look(self, schedule: Schedule, computed: Computed) -> FiniteCheck:
        """Begin the check of each chunk that fills blocks which others could find. It runs now, because the sampler may
        overwrite logits."""
        rows, requests, row = [], [], 0
        for chunk, fills in zip(schedule.chunks, self._scheduler.fills_blocks(schedule), strict=True):
            if fills and chunk.samples:
                rows.append(row)
                requests.append(chunk.request)
            row += len(chunk.samples)
        num_rows = computed.logits.shape[0]
        rows += range(num_rows - len(computed.ends), num_rows)
        return FiniteCheck(computed.logits, rows, [*requests, *computed.ends])

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
        except RuntimeError as error:  # torch raises this when the CPU's memory runs out
            raise EngineDeadError(
                f"no memory for a K/V cache of {num_blocks} blocks; build one with a lower kv_cache_bytes"
            ) from error

    def _without_culprits(
        self, schedule: Schedule, error: BaseException
    ) -> tuple[Schedule, Computed, dict[Group, str]]:
        """After the model raised, run each chunk alone, then those together whose group did not raise."""
        failed: dict[Group, str] = {}
        for chunk in schedule.chunks:
            if chunk.request.group in failed:
                continue
            try:
                self._compute([chunk], eager=True)
            except BaseException as own_error:
                if _is_no_requests(own_error):
                    raise
                failed[chunk.request.group] = f"the model failed on this request: {own_error!r}"
        sound = [chunk for chunk in schedule.chunks if chunk.request.group not in failed]
        remaining = Schedule(sound, (), schedule.preempted)
        if not sound:
            return remaining, _nothing(), failed
        try:
            return remaining, self._compute(sound, eager=True), failed
        except BaseException as together:
            if _is_no_requests(together):
                raise
            # Each chunk succeeds alone, but together they fail: no request can be blamed.
            raise EngineDeadError(f"the model fails on batches: {error!r}") from error


def _select(sampler: RequestSampler, now: Launched, *, again: bool) -> Selected:
    sampled, of_prompts, _ = now.computed.divide()
    told, failed = prompt_logprobs_of(of_prompts, now.computed.prompt_rows, sampler, again=again)
    selection = select_rows(sampled, now.computed.sample_requests, sampler, again=again)
    return Selected(selection, told, now.finite.failed(), failed)


def _is_no_requests(error: BaseException) -> bool:
    """Return whether the error concerns more than one request: the engine or the device has failed, or the process was
    interrupted."""
    return isinstance(error, EngineDeadError | torch.AcceleratorError) or interrupts_the_process(error)


def _nothing() -> Computed:
    return Computed(torch.empty(0, 0), (), (), ())

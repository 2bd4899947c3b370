"""A real engine beside the simulator: the cost of its steps, and the results of three workloads in both. Only the
engine's time counts: a request due at second 3 arrives when the engine has computed for 3 seconds. These are seconds of
wall-clock time or of processor time. With processor time, other processes of a busy machine don't count, except for
their effect on the caches, and each thread counts separately.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from paged_bench import workloads
from paged_bench.workloads import BenchRequest, Workload
from paged_core import Engine, EngineConfig, SamplingParams, StepStats, hookimpl
from paged_simulation.costs import CostModel, LinearCosts, StepSize, fit
from paged_simulation.fleet import Fleet, SimulationOutcome, simulate
from paged_simulation.replica import Record, Sizes
from paged_simulation.report import figures
from paged_simulation.traffic import Arrival

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
_LONG = 400  # tokens of the long prompts that costs are fitted to


class LastStep:
    """A plugin that records what each step computed."""

    def __init__(self) -> None:
        self.last: StepStats | None = None
        self._resident = 0

    @hookimpl
    def on_step_finished(self, stats: StepStats) -> None:
        self.last = stats

    def take(self) -> StepSize | None:
        """The size of the step since the last call."""
        stats, self.last = self.last, None
        if stats is None:
            return None
        resident = stats.num_blocks_used * stats.block_size - stats.num_slots_wasted
        before, self._resident = self._resident, resident
        context = max(resident, before + stats.num_tokens)  # rows that ended in the step are already gone
        return StepSize(stats.num_tokens, stats.num_sampled, context)


def fitted(model: str, seed: int, clock: str, num_requests: int) -> LinearCosts:
    """The cost of a model's steps here, from requests that arrive one by one, long prompts among them. ``clock``: one
    of
    CLOCKS."""
    engine, steps = _engine(model)
    work = _mixed(engine, seed, num_requests)
    seen: list[tuple[StepSize, float]] = []
    _run(engine, steps, work.requests, CLOCKS[clock], lambda size, took: seen.append((size, took)))
    engine.close()
    return fit(seen, f"{model}: {len(seen)} steps, {clock} clock")


def compared(model: str, costs: CostModel, seed: int, clock: str, num_requests: int) -> dict[str, dict[str, Any]]:
    """Figures of three workloads, each run and simulated: ``NAME, run`` and ``NAME, simulated``."""
    found: dict[str, dict[str, Any]] = {}
    for name, make in _WORKLOADS.items():
        engine, steps = _engine(model)
        work = make(engine, seed, num_requests)
        arrivals = [Arrival(each.arrival_s, list(each.prompt), each.num_output) for each in work.requests]
        found[f"{name}, run"] = figures(_run(engine, steps, work.requests, CLOCKS[clock], lambda size, took: None))
        sizes = _sizes(engine)
        engine.close()
        found[f"{name}, simulated"] = figures(simulate(iter(arrivals), Fleet(sizes, routing="load"), costs))
    return found


def _engine(model: str) -> tuple[Engine, LastStep]:
    steps = LastStep()
    engine = Engine(model, EngineConfig(), plugins=[steps])
    engine.add_request("warm-up", [5] * 40, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    while engine.has_work:
        engine.step()
    steps.take()
    return engine, steps


def _sizes(engine: Engine) -> Sizes:
    sizes = engine.sizes
    return Sizes(sizes.num_blocks, sizes.block_size, sizes.max_num_seqs, sizes.max_num_batched_tokens,
                 sizes.max_model_len, engine.config.watermark)  # fmt: skip


def _run(
    engine: Engine,
    steps: LastStep,
    requests: Sequence[BenchRequest],
    clock: Callable[[], float],
    saw: Callable[[StepSize, float], object],
) -> SimulationOutcome:
    """Drive an engine as Fleet drives its replicas."""
    record, now, busy_s, num_steps = Record(), 0.0, 0.0, 0
    coming = iter(sorted(requests, key=lambda each: each.arrival_s))
    arrived: dict[str, float] = {}
    last: dict[str, float] = {}
    following = next(coming, None)
    first_stats = engine.last_stats
    while following is not None or engine.has_work:
        while following is not None and (following.arrival_s <= now or not engine.has_work):
            now = max(now, following.arrival_s)
            _submit(engine, following)
            arrived[str(following.index)] = following.arrival_s
            following = next(coming, None)
        began = clock()
        outputs = engine.step()
        took = clock() - began
        now, busy_s, num_steps = now + took, busy_s + took, num_steps + 1
        size = steps.take()
        if size is not None:
            saw(size, took)
        for output in outputs:
            _note(record, output, now, arrived, last)
    stats = engine.last_stats
    assert stats is not None and first_stats is not None
    queries, hits = (stats.total_prefix_queries - first_stats.total_prefix_queries,
                     stats.total_prefix_hits - first_stats.total_prefix_hits)  # fmt: skip
    span = now - min(arrived.values())
    return SimulationOutcome(record, span, 0, queries, hits, stats.total_preemptions, num_steps, (busy_s / span,))


def _note(record: Record, output: Any, now: float, arrived: dict[str, float], last: dict[str, float]) -> None:
    name = output.request.id
    if output.token_ids:
        record.num_output_tokens += len(output.token_ids)
        if name in last:
            record.between_tokens.add(now - last[name])
        else:
            record.first_token.add(now - arrived[name])
        last[name] = now
    if output.finish_reason is not None:
        record.whole.add(now - arrived[name])
        record.num_finished += 1
        record.num_prompt_tokens += output.request.num_prompt


def _submit(engine: Engine, request: BenchRequest) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=request.num_output, ignore_eos=True)
    engine.add_request(str(request.index), request.prompt, params)


# ---- what is asked ---------------------------------------------------------------------------------------------------


def _encode(engine: Engine) -> Callable[[str], Sequence[int]]:
    tokenizer = engine.tokenizer
    assert tokenizer is not None, "the model has no tokenizer to make prompts with"
    return lambda text: list(tokenizer.encode(text))


def _mixed(engine: Engine, seed: int, num_requests: int) -> Workload:
    encode = _encode(engine)
    short = workloads.with_poisson_arrivals(workloads.synthetic(encode, num_requests, seed), 1.0, seed)
    rngs = [random.Random(f"long {seed} {number}") for number in range(4)]
    long = [
        BenchRequest(num_requests + i, workloads.prose(encode, _LONG, rng), 8, 4.0 * i) for i, rng in enumerate(rngs)
    ]
    return Workload("to fit costs to", (*short.requests, *long))


def _at_once(engine: Engine, seed: int, num_requests: int) -> Workload:
    return workloads.synthetic(_encode(engine), num_requests, seed)


def _one_by_one(engine: Engine, seed: int, num_requests: int) -> Workload:
    return workloads.with_poisson_arrivals(workloads.synthetic(_encode(engine), num_requests, seed), 1.5, seed)


def _shared(engine: Engine, seed: int, num_requests: int) -> Workload:
    encode = _encode(engine)
    alike = workloads.with_shared_prefix(workloads.synthetic(encode, num_requests, seed), encode, 256, seed)
    return workloads.with_poisson_arrivals(alike, 1.5, seed)


_WORKLOADS: dict[str, Callable[[Engine, int, int], Workload]] = {
    "at once": _at_once, "Poisson": _one_by_one, "shared prefix": _shared,
}  # fmt: skip

"""The system under test: the same loaded model on a paged_core Engine. Knows the engine's public interface only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from paged_bench.results import Run, Sample
from paged_bench.stock import Told
from paged_bench.workloads import BenchRequest
from paged_core import Engine, EngineConfig, FinishReason, RequestOutput, SamplingParams

Progress = Callable[[str, int, int], None]


class Paged:
    """A new engine for each run, so that no run uses prefixes cached by another. Building it isn't timed."""

    def __init__(
        self, model: Any, config: EngineConfig, progress: Progress | None = None, plugins: Sequence[Any] = ()
    ) -> None:
        self.model = model
        self.config = config
        self._progress = progress
        self._plugins = plugins

    def run(self, requests: Sequence[BenchRequest], told: Told) -> Run:
        engine = Engine(self.model, self.config, plugins=self._plugins, progress=self._progress)
        self._progress = None  # kernels are compiled once, so later engines report nothing
        try:
            _warm_up(engine, requests[0])
            return _drive(engine, requests, told)
        finally:
            engine.close()


def _drive(engine: Engine, requests: Sequence[BenchRequest], told: Told) -> Run:
    waiting = sorted(requests, key=lambda request: request.arrival_s, reverse=True)
    tokens: dict[tuple[int, int], list[int]] = {(r.index, i): [] for r in requests for i in range(r.n)}
    times: dict[tuple[int, int], list[float]] = {key: [] for key in tokens}
    reserved = wasted = 0
    began = time.perf_counter()
    while waiting or engine.has_work:
        while waiting and waiting[-1].arrival_s <= time.perf_counter() - began:
            _submit(engine, waiting.pop())
        if not engine.has_work:
            time.sleep(max(0.0, began + waiting[-1].arrival_s - time.perf_counter()))
            continue
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            _refuse_failure(output)
            key = (int(output.request.id), output.request.index)
            tokens[key] += output.token_ids
            times[key] += [now] * len(output.token_ids)
        told(sum(len(output.token_ids) for output in outputs))
        stats = engine.last_stats
        if stats is not None:
            reserved += stats.num_blocks_used * stats.block_size
            wasted += stats.num_slots_wasted
    samples = {
        r.index: tuple(Sample(tuple(tokens[r.index, i]), tuple(times[r.index, i])) for i in range(r.n))
        for r in requests
    }
    return Run(samples, time.perf_counter() - began, kv_waste=wasted / reserved if reserved else None)


def _submit(engine: Engine, request: BenchRequest) -> None:
    sampled = request.n > 1
    params = SamplingParams(
        n=request.n,
        temperature=1.0 if sampled else 0.0,
        top_k=0,
        seed=request.index if sampled else None,
        max_tokens=request.num_output,
        ignore_eos=True,  # and no min_tokens: it would forbid the end-of-sequence token, which stock may choose here
    )
    engine.add_request(str(request.index), request.prompt, params)


def _refuse_failure(output: RequestOutput) -> None:
    if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        raise RuntimeError(f"request {output.request.id} failed: {output.error or output.finish_reason}")


def _warm_up(engine: Engine, request: BenchRequest) -> None:
    """A few steps on a prompt that shares no prefix with the workload's."""
    prompt = [request.prompt[-1]] * len(request.prompt)
    engine.add_request("warm-up", prompt, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    while engine.has_work:
        engine.step()

"""The A/B: which systems run, in which order, and where the results go. Knows neither models nor engines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paged_bench import chart, report, workloads
from paged_bench.agreement import Agreement, compare, reference_of
from paged_bench.outcome import Outcome
from paged_bench.progress import Progress
from paged_bench.quality import Quality
from paged_bench.results import Run, summarise
from paged_bench.worker import ModelFacts, SystemFailed, SystemProcess, SystemSpec
from paged_bench.workloads import Workload
from paged_core import ConfigError, EngineConfig

PAGED = "paged"


def main(args: argparse.Namespace, config: EngineConfig) -> int:
    """Run ``paged bench``. Exit status 1 if paged itself failed."""
    baselines = parse_baselines(args.baseline)
    if args.plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'paged-core[bench]'")
    workload = build_workload(args)
    outcome = _Comparison(args, config, baselines).run(workload)
    report.print_tables(outcome)
    if args.json is not None:
        report.write_json(outcome, args.json, config, args.seed)
    if args.plot is not None:
        chart.write(outcome, args.plot)
    for path in filter(None, (args.json, args.plot)):
        print(f"Written: {path}")
    return 1 if PAGED in outcome.failures else 0


def parse_baselines(text: str) -> list[str]:
    """Names of systems from a list with commas.

    Raises:
        ConfigError: a name is unknown.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        kind, _, size = name.partition(":")
        if kind == "hf-static" and size.isdecimal() and int(size) > 0:
            continue
        if name not in ("hf-sequential", "hf-continuous", "paged-unshared", "paged-generate"):
            raise ConfigError(
                f"--baseline names {name!r}; use hf-sequential, hf-static:SIZE (hf-static:16), hf-continuous, "
                "paged-generate or paged-unshared"
            )
    return names


def build_workload(args: argparse.Namespace) -> Workload:
    """The workload that the options describe; it may still be longer than the model allows."""
    encode = _encoder(args.model)
    if args.time_scale is not None and (args.trace is None or args.rate is not None):
        raise ConfigError("--time-scale stretches the arrivals of --trace; --rate sets them anew: give one of the two")
    if args.trace is not None:
        scale = args.time_scale or 1.0
        workload = workloads.from_trace(encode, args.trace, args.requests, args.rate, scale, args.seed)
    else:
        if args.prompts is not None:
            workload = workloads.from_prompts(encode, args.prompts, args.requests, args.seed)
        else:
            workload = workloads.synthetic(encode, args.requests or 64, args.seed)
        if args.rate is not None:
            workload = workloads.with_poisson_arrivals(workload, args.rate, args.seed)
    if args.shared_prefix is not None:
        workload = workloads.with_shared_prefix(workload, encode, args.shared_prefix, args.seed)
    return workloads.with_samples(workload, args.n) if args.n > 1 else workload


def run_order(baselines: Sequence[str], repeats: int, quick: bool) -> list[str]:
    """The runs interleaved, so that a machine that slows down or speeds up affects all systems alike."""
    if quick:
        return [PAGED, *baselines, PAGED]
    return [*baselines, PAGED] * repeats


class _Comparison:
    """The running workers, and their results so far."""

    def __init__(self, args: argparse.Namespace, config: EngineConfig, baselines: Sequence[str]) -> None:
        self._args = args
        self._config = config
        self._order = run_order(baselines, args.repeats, args.quick)
        self._workers: dict[str, SystemProcess] = {}
        self._runs: dict[str, list[Run]] = {name: [] for name in (PAGED, *baselines)}
        self._failures: dict[str, str] = {}

    def run(self, workload: Workload) -> Outcome:
        try:
            facts = self._paged_facts()
            limit = min(facts.max_model_len, self._config.max_model_len or facts.max_model_len)
            workload = workloads.fitted(workload, limit)
            for number, name in enumerate(self._order):
                self._run_one(name, number, workload)
            runs = {name: done for name, done in self._runs.items() if done}
            agreements, reference = self._agreements(runs, workload)
            quality = self._quality()
        finally:
            for worker in self._workers.values():
                worker.close()
        summaries = tuple(summarise(name, done, workload.requests) for name, done in runs.items())
        return Outcome(facts, workload, tuple(self._order), summaries, self._failures, agreements, quality, reference)

    def _paged_facts(self) -> ModelFacts:
        """Raises if paged can't run the model, because then there is nothing to compare."""
        try:
            with Progress() as progress:
                progress(f"loading {self._args.model}", 0, 1)
                return self._worker(PAGED).facts()
        except SystemFailed as failure:
            raise ConfigError(f"can't run {self._args.model}: {failure}") from None

    def _worker(self, name: str) -> SystemProcess:
        if name not in self._workers:
            limit_s = self._args.sequential_limit or (15.0 if self._args.quick else 120.0)
            job = SystemSpec(name, self._args.model, self._args.dtype, self._config, limit_s)
            self._workers[name] = SystemProcess(job)
        return self._workers[name]

    def _run_one(self, name: str, number: int, workload: Workload) -> None:
        if name in self._failures:
            return
        total, done = workload.num_output_tokens, 0
        title = f"[{number + 1}/{len(self._order)}] {name}"
        with Progress("tok") as progress:

            def told(num: int) -> None:
                nonlocal done
                done += num
                progress(title, done, total)

            try:
                progress(title, 0, total)
                self._runs[name].append(self._worker(name).run(workload.requests, told, progress))
            except SystemFailed as failure:
                self._failures[name] = str(failure)
        if name in self._failures:
            print(f"{name} failed: {self._failures[name]}", file=sys.stderr)
        if name != PAGED and name not in self._order[number + 1 :] and name in self._workers:
            self._workers.pop(name).close()  # frees its memory for the others

    def _agreements(self, runs: dict[str, list[Run]], workload: Workload) -> tuple[tuple[Agreement, ...], str]:
        if any(request.n > 1 for request in workload.requests):
            return (), ""  # sampled tokens can't be compared
        samples = {name: done[0].samples for name, done in runs.items()}
        reference, words = reference_of(samples)
        ask = self._margins
        found = [compare(name, samples[name], reference, workload.requests, ask) for name in samples]
        return tuple(agreement for agreement in found if agreement.num_compared), words

    def _quality(self) -> Quality | None:
        if self._config.weights is None or PAGED in self._failures:
            return None
        try:
            return self._worker(PAGED).quality()
        except SystemFailed as failure:
            print(f"the quality of {self._config.weights} weights is unknown: {failure}", file=sys.stderr)
            return None

    def _margins(self, questions: list[tuple[tuple[int, ...], int, int]]) -> list[tuple[float, float]]:
        """Computed by stock's modules, in the worker that is still running."""
        try:
            return self._worker(PAGED).margins(questions)
        except SystemFailed:
            return [(float("nan"), float("nan"))] * len(questions)


def _encoder(source: str) -> workloads.Encode:
    from paged_hf.loading import load

    tokenizer: Any = load.load_tokenizer(source)
    if tokenizer is None and not Path(source).expanduser().exists():
        raise ConfigError(f"there is no folder or file {source}")
    if tokenizer is None:
        raise ConfigError(f"no tokenizer found for {source!r}; prompts are made of text")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text))

    return encode

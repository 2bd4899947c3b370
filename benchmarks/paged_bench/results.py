"""The results of a system on a workload, and their summary. Knows nothing of how they were produced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from paged_bench.workloads import BenchRequest


@dataclass(frozen=True)
class Sample:
    """One generated sequence. Times are seconds since the run began, one a token."""

    token_ids: tuple[int, ...]
    times_s: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One pass of one system over the requests it was given."""

    samples: dict[int, tuple[Sample, ...]]  # by request index
    duration_s: float
    kv_waste: float | None = None  # share of the reserved K/V slots without a useful token, over the run
    peak_bytes: int | None = None  # resident memory above the loaded model, at its highest

    @property
    def num_output_tokens(self) -> int:
        return sum(len(sample.token_ids) for samples in self.samples.values() for sample in samples)


@dataclass(frozen=True)
class Summary:
    """Medians over the runs of one system."""

    system: str
    num_runs: int
    num_requests: int
    tokens_per_s: float  # generated tokens that were asked for, per second of the whole run
    tokens_per_s_all: tuple[float, ...]  # one a run, in order
    requests_per_s: float
    ttft_p50_s: float | None  # arrival to first token; None for a system that ran a part of the requests only
    ttft_p99_s: float | None
    itl_p50_s: float | None  # between two tokens of one sequence
    itl_p99_s: float | None
    peak_bytes: int | None  # the highest of the runs
    kv_waste: float | None


def summarise(system: str, runs: Sequence[Run], requests: Sequence[BenchRequest]) -> Summary:
    """One line of the table."""
    arrivals = {request.index: request.arrival_s for request in requests}
    complete = len(runs[0].samples) == len(requests)
    speeds = [run.num_output_tokens / run.duration_s for run in runs]
    first_tokens = [_first_token_waits(run, arrivals) for run in runs] if complete else []
    gaps = [_gaps(run) for run in runs]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    wastes = [run.kv_waste for run in runs if run.kv_waste is not None]
    return Summary(
        system=system,
        num_runs=len(runs),
        num_requests=len(runs[0].samples),
        tokens_per_s=median(speeds),
        tokens_per_s_all=tuple(speeds),
        requests_per_s=median(len(run.samples) / run.duration_s for run in runs),
        ttft_p50_s=_median_percentile(first_tokens, 50),
        ttft_p99_s=_median_percentile(first_tokens, 99),
        itl_p50_s=_median_percentile(gaps, 50),
        itl_p99_s=_median_percentile(gaps, 99),
        peak_bytes=max(peaks, default=None),
        kv_waste=median(wastes) if wastes else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` per cent of the values don't exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _median_percentile(runs: Sequence[Sequence[float]], percent: float) -> float | None:
    found = [percentile(values, percent) for values in runs if values]
    return median(found) if found else None


def _first_token_waits(run: Run, arrivals: dict[int, float]) -> list[float]:
    return [sample.times_s[0] - arrivals[index] for index, samples in run.samples.items() for sample in samples]


def _gaps(run: Run) -> list[float]:
    return [
        later - earlier
        for samples in run.samples.values()
        for sample in samples
        for earlier, later in zip(sample.times_s, sample.times_s[1:], strict=False)
    ]

"""The outcome of a comparison, from which tables, JSON and charts are made."""

from __future__ import annotations

from dataclasses import dataclass

from paged_bench.agreement import Agreement
from paged_bench.quality import Quality
from paged_bench.results import Summary
from paged_bench.worker import ModelFacts
from paged_bench.workloads import Workload


@dataclass(frozen=True)
class Outcome:
    """All that a report needs."""

    facts: ModelFacts
    workload: Workload
    order: tuple[str, ...]  # of the runs
    summaries: tuple[Summary, ...]  # paged first
    failures: dict[str, str]  # system -> why its results are missing or incomplete
    agreements: tuple[Agreement, ...]
    quality: Quality | None  # of weights that were quantised
    reference: str  # description of the reference; empty: there is none

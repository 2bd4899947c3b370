"""The result of an A/B as tables on the terminal and as JSON. Knows nothing of the measurement."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paged_bench.agreement import Agreement
from paged_bench.outcome import Outcome
from paged_bench.quality import Quality
from paged_bench.results import Summary
from paged_bench.workloads import Workload
from paged_core import EngineConfig

COLUMNS = (
    "system",
    "runs",
    "tokens/s",
    "paged is",
    "requests/s",
    "first token p50/p99",
    "next token p50/p99",
    "memory",
    "KV waste",
    "same tokens",
)
_MOST_DIFFERENCES = 12  # shown on the terminal; the JSON has all
_PACKAGES = ("paged-core", "torch", "transformers", "numba", "numpy")


def print_tables(outcome: Outcome) -> None:
    """To standard output; with rich if it is installed."""
    print()
    for line in heading(outcome):
        print(line)
    _print_table(rows(outcome))
    for line in remarks(outcome):
        print(line)


def heading(outcome: Outcome) -> list[str]:
    """What was run, where."""
    facts, work = outcome.facts, outcome.workload
    return [
        f"{facts.name} ({facts.num_parameters / 1e6:.0f}M parameters, {facts.dtype}) on {cpu_name()}, "
        f"{facts.num_threads} threads",
        f"{len(work.requests)} requests ({work.description}): {work.num_prompt_tokens} prompt tokens, "
        f"{work.num_output_tokens} output tokens" + "".join(f"; {note}" for note in work.notes),
    ]


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """The table's cells, one row a system, in the order of COLUMNS."""
    agreements = {agreement.system: agreement for agreement in outcome.agreements}
    paged = next((summary for summary in outcome.summaries if summary.system == "paged"), None)
    total = len(outcome.workload.requests)
    table = [_row(summary, paged, agreements.get(summary.system), total) for summary in outcome.summaries]
    shown = {summary.system for summary in outcome.summaries}
    failed = [name for name in outcome.failures if name not in shown]
    return table + [(name, "failed", *[""] * (len(COLUMNS) - 2)) for name in failed]


def remarks(outcome: Outcome) -> list[str]:
    """Notes for the table, and every difference of tokens."""
    lines = ["tokens/s: median of the runs. memory: peak resident size above the loaded model, own process each."]
    for summary in outcome.summaries:
        if summary.num_requests < len(outcome.workload.requests):
            lines.append(
                f"{summary.system}: {summary.num_requests} of {len(outcome.workload.requests)} requests, evenly picked."
            )
    lines += [f"{name} failed: {why}" for name, why in outcome.failures.items()]
    if outcome.reference:
        lines.append(f"same tokens: against {outcome.reference}.")
    for agreement in outcome.agreements:
        lines += _differences(agreement)
    if outcome.quality is not None:
        lines.append(_quality(outcome.quality))
    return lines


def _quality(found: Quality) -> str:
    return (
        f"{found.weights} weights, on {found.num_tokens} tokens of plain English: perplexity "
        f"{found.perplexity:.3f}, {found.change:+.2%} ({found.perplexity_plain:.3f} with the weights as they are); "
        f"the likeliest next token is the same at {found.same_likeliest:.1%} of the places."
    )


def write_json(outcome: Outcome, path: Path, config: EngineConfig, seed: int) -> None:
    """All figures, and what they were made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(as_dict(outcome, config, seed)), indent=2) + "\n", encoding="utf-8")


def as_dict(outcome: Outcome, config: EngineConfig, seed: int) -> dict[str, Any]:
    """What ``write_json`` writes."""
    paged = next((summary.tokens_per_s for summary in outcome.summaries if summary.system == "paged"), None)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["paged", *sys.argv[1:]]),
        "seed": seed,
        "model": asdict(outcome.facts),
        "hardware": _hardware(outcome.facts.num_threads),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "engine": asdict(config),
        "workload": _workload(outcome.workload),
        "order": outcome.order,
        "systems": {
            summary.system: {**asdict(summary), "paged_is_times": paged and paged / summary.tokens_per_s}
            for summary in outcome.summaries
        },
        "failures": outcome.failures,
        "quality": outcome.quality and {**asdict(outcome.quality), "change": outcome.quality.change},
        "reference": outcome.reference,
        "agreement": {
            agreement.system: {
                **asdict(agreement),
                "num_identical": agreement.num_identical,
                "fraction": agreement.fraction,
            }
            for agreement in outcome.agreements
        },
    }


def _hardware(num_threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": num_threads,
        "machine": platform.machine(),
        "memory_bytes": _memory_bytes(),
        "system": platform.system(),
    }


def _workload(work: Workload) -> dict[str, Any]:
    return {
        "description": work.description,
        "notes": work.notes,
        "num_requests": len(work.requests),
        "num_prompt_tokens": work.num_prompt_tokens,
        "num_output_tokens": work.num_output_tokens,
        "prompt_tokens": [len(request.prompt) for request in work.requests],
        "output_tokens": [request.num_output for request in work.requests],
        "arrivals_s": [request.arrival_s for request in work.requests],
    }


def cpu_name() -> str:
    """The processor's name, if the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _row(summary: Summary, paged: Summary | None, agreement: Agreement | None, total: int) -> tuple[str, ...]:
    part = "" if summary.num_requests == total else "*"
    ratio = "" if paged is None or summary is paged else f"{paged.tokens_per_s / summary.tokens_per_s:.1f}x"
    return (
        summary.system + part,
        str(summary.num_runs),
        f"{summary.tokens_per_s:.1f}",
        ratio,
        f"{summary.requests_per_s:.2f}",
        _pair(summary.ttft_p50_s, summary.ttft_p99_s),
        _pair(summary.itl_p50_s, summary.itl_p99_s),
        "-" if summary.peak_bytes is None else f"{summary.peak_bytes / 2**20:.0f} MiB",
        "-" if summary.kv_waste is None else f"{summary.kv_waste:.1%}",
        "-" if agreement is None else f"{agreement.num_identical}/{agreement.num_compared}",
    )


def _pair(p50_s: float | None, p99_s: float | None) -> str:
    return "-" if p50_s is None or p99_s is None else f"{_time(p50_s)} / {_time(p99_s)}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _differences(agreement: Agreement) -> list[str]:
    shown = agreement.differences[:_MOST_DIFFERENCES]
    lines = [
        f"  {agreement.system}, request {d.index}: differs from output token {d.position} on, "
        + ("an end" if d.margin is None else f"where stock's two likeliest logits are {d.margin:.2g} apart")
        for d in shown
    ]
    left = len(agreement.differences) - len(shown)
    return lines + ([f"  {agreement.system}: {left} more requests differ"] if left else [])


def _print_table(table: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(table))
        return
    pretty = Table()
    for column in COLUMNS:
        pretty.add_column(column, justify="left" if column == "system" else "right")
    for row in table:
        pretty.add_row(*row, style="bold" if row[0] == "paged" else None)
    console = Console()
    console.print(pretty) if console.width >= 110 else print(plain_table(table))


def plain_table(table: Sequence[Sequence[str]]) -> str:
    """The table in plain characters."""
    lines = [COLUMNS, *table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None

"""An outcome as numbers, a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paged_simulation.fleet import SimulationOutcome
from paged_simulation.histogram import Histogram

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def figures(outcome: SimulationOutcome) -> dict[str, Any]:
    """All numbers of an outcome. Times in seconds, shares from 0 to 1."""
    record = outcome.record
    looks = max(1, record.num_looks)
    return {
        "num_requests": record.num_finished,
        "num_refused": outcome.num_refused,
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.num_output_tokens,
        "span_s": outcome.span_s,
        "output_tokens_s": record.num_output_tokens / outcome.span_s,
        "requests_s": record.num_finished / outcome.span_s,
        "first_token_s": percentiles(record.first_token),
        "between_tokens_s": percentiles(record.between_tokens),
        "whole_s": percentiles(record.whole),
        "prefix_hit_rate": outcome.num_prefix_hits / max(1, outcome.num_prefix_queries),
        "preemptions": outcome.num_preemptions,
        "steps": outcome.num_steps,
        "tokens_a_step": record.num_output_tokens / max(1, outcome.num_steps),
        "kv_usage": record.usage / looks,
        "kv_waste": record.waste / looks,
        "busy_least": min(outcome.busy),
        "busy_most": max(outcome.busy),
    }


def percentiles(histogram: Histogram) -> dict[str, float]:
    return {"mean": histogram.mean} | {name: histogram.percentile(share) for name, share in _SHARES.items()}


_ROWS: Sequence[tuple[str, str, str]] = (
    ("output tokens per second", "output_tokens_s", "{:,.0f}"),
    ("requests per second", "requests_s", "{:,.2f}"),
    ("first token, p50 / p90 / p99", "first_token_s", "ms"),
    ("next token, p50 / p90 / p99", "between_tokens_s", "ms"),
    ("whole request, p50 / p90 / p99", "whole_s", "ms"),
    ("prompt tokens found in the prefix cache", "prefix_hit_rate", "{:.1%}"),
    ("preemptions", "preemptions", "{:,}"),
    ("rows that sample per step", "tokens_a_step", "{:,.1f}"),
    ("K/V blocks in use", "kv_usage", "{:.1%}"),
    ("K/V slots wasted", "kv_waste", "{:.1%}"),
    ("replicas busy, least", "busy_least", "{:.1%}"),
    ("replicas busy, most", "busy_most", "{:.1%}"),
    ("refused", "num_refused", "{:,}"),
)


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a column for each outcome's figures, under its name."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for told, name, form in _ROWS:
        cells = [_cell(found[name], form) for found in columns.values()]
        lines.append(f"| {told} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_COMPARED: Sequence[tuple[str, Callable[[Mapping[str, Any]], float], str]] = (
    ("output tokens per second", lambda f: f["output_tokens_s"], "{:,.0f}"),
    ("first token, p50, ms", lambda f: f["first_token_s"]["p50"] * 1e3, "{:,.0f}"),
    ("next token, p50, ms", lambda f: f["between_tokens_s"]["p50"] * 1e3, "{:,.1f}"),
    ("whole request, p50, ms", lambda f: f["whole_s"]["p50"] * 1e3, "{:,.0f}"),
    ("prompt tokens found in the prefix cache, %", lambda f: f["prefix_hit_rate"] * 100, "{:.1f}"),
)


def differences(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: for each workload the real result, the simulated one, and the error. Columns are named
    ``NAME, run`` and ``NAME, simulated``."""
    names = [name.removesuffix(", run") for name in columns if name.endswith(", run")]
    lines = ["| run / simulated | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for told, value, form in _COMPARED:
        cells = []
        for name in names:
            run, simulated = value(columns[f"{name}, run"]), value(columns[f"{name}, simulated"])
            off = f" ({(simulated / run - 1) * 100:+.0f} %)" if run else ""
            cells.append(f"{form.format(run)} / {form.format(simulated)}{off}")
        lines.append(f"| {told} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(columns: Mapping[str, Mapping[str, Any]], path: Path, across: str = "") -> None:
    """Plot throughput, both latencies, hit rates and preemptions, if there are any, over the columns' names in order;
    with names of the form ``line @ place`` several lines."""
    from matplotlib import pyplot

    lines: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, found in columns.items():
        line, _, place = name.rpartition(" @ ")
        lines.setdefault(line, []).append((place, found))
    charts: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("output tokens per second", lambda f: f["output_tokens_s"]),
        ("first token, p50, s", lambda f: f["first_token_s"]["p50"]),
        ("first token, p99, s", lambda f: f["first_token_s"]["p99"]),
        ("next token, p99, s", lambda f: f["between_tokens_s"]["p99"]),
        ("found in the prefix cache", lambda f: f["prefix_hit_rate"]),
        ("preemptions", lambda f: f["preemptions"]),
    )
    shown = [(title, value) for title, value in charts if any(map(value, columns.values()))]
    figure, axes = pyplot.subplots(2, -(-len(shown) // 2), figsize=(12, 6), squeeze=False)
    for axis in list(axes.flat)[len(shown) :]:
        axis.remove()
    for axis, (title, value) in zip(axes.flat, shown, strict=False):
        for line, points in lines.items():
            axis.plot([place for place, _ in points], [value(found) for _, found in points], marker="o", label=line)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(across, fontsize=8)
        axis.set_ylim(0, 1.1 * max(map(value, columns.values())))
        axis.tick_params(labelsize=8)
    if len(lines) > 1:
        axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _cell(value: Any, form: str) -> str:
    if form == "ms":
        return " / ".join(f"{value[name] * 1e3:,.0f}" for name in _SHARES) + " ms"
    return form.format(value)

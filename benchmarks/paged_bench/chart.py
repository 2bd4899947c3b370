"""The result of an A/B as a PNG: speed, first token, KV waste."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paged_bench.outcome import Outcome
from paged_bench.report import heading

_OURS, _THEIRS = "#1f6f5c", "#b9bec5"


def write(outcome: Outcome, path: Path) -> None:
    """Needs matplotlib; draws without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = outcome.summaries[::-1]  # bars are drawn from below
    figure: Any = Figure(figsize=(13, 1.6 + 0.6 * max(2, len(summaries))), layout="constrained")
    FigureCanvasAgg(figure)
    panels: tuple[tuple[str, list[float | None], str], ...] = (
        ("output tokens per second (more is better)", [s.tokens_per_s for s in summaries], "{:.0f}"),
        ("time to first token, p50 [s] (less is better)", [s.ttft_p50_s for s in summaries], "{:.2f}"),
        ("K/V slots without a token of use [%]", [_percent(s.kv_waste) for s in summaries], "{:.1f}"),
    )
    names = [s.system if s.num_requests == len(outcome.workload.requests) else f"{s.system}*" for s in summaries]
    colors = [_OURS if s.system.startswith("paged") else _THEIRS for s in summaries]
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars = axes.barh(names, [value or 0 for value in values], color=colors)
        axes.bar_label(bars, [form.format(value) if value is not None else "-" for value in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    starred = "   (* a part of the requests)" if any(name.endswith("*") for name in names) else ""
    figure.suptitle("\n".join(heading(outcome)) + starred, fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share

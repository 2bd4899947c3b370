"""Rows as a table on a terminal, and as docs/coverage.md."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import version

from paged_coverage.check import HALVES, NATIVE, NOT_BUILT, SECOND, STOCK, TIERS, WRONG, Row
from paged_coverage.tiny import class_name

_HALVES = [str(dtype).removeprefix("torch.") for dtype in HALVES]
_MEANING = {
    NATIVE: "runs on the paged engine, and its greedy tokens are stock's",
    SECOND: "stock's own loop over a cache that keeps K/V in blocks (`PagedCache`); its tokens are stock's",
    STOCK: "stock, untouched; the reason is what keeps it from the engine",
    NOT_BUILT: "no tiny random model of it could be made, or stock's own `generate` fails on that",
    WRONG: "other tokens than stock's, or an error where stock has none: a bug of ours",
}


def line(row: Row, model_types: Sequence[str]) -> str:
    """For a terminal, in columns wide enough for all of ``model_types``."""
    widths = max(map(len, model_types)), max(len(class_name(name)) for name in model_types), max(map(len, TIERS))
    cells = zip((row.model_type, row.class_name, row.tier), widths, strict=True)
    other = [f"{tier} in {name}" for name, tier in zip(_HALVES, row.halves, strict=False) if tier != row.tier]
    return "  ".join([*(f"{cell:{width}}" for cell, width in cells), "; ".join([*other, row.reason])])


def summary(rows: Sequence[Row]) -> str:
    """How many of each tier there are."""
    return ", ".join(f"{count} {tier}" for tier, count in _counts(rows).items() if count)


def markdown(rows: Sequence[Row]) -> str:
    """The text of docs/coverage.md."""
    counts = _counts(rows)
    return "\n".join(
        [
            "# Coverage",
            "",
            f"All {len(rows)} entries of transformers' table of causal language models, each tried with a tiny model "
            "of random weights.",
            "",
            "| tier | entries | what it means |",
            "|---|---:|---|",
            *(f"| {tier} | {counts[tier]} | {_MEANING[tier]} |" for tier in TIERS),
            "",
            "Each model answered three prompts of mixed lengths, padded on the left, the longest of them longer than "
            "any sliding",
            "window: greedy, on a CPU, `paged_generate(model)` against `model.generate`. Native ones also did "
            "so in the engine itself:",
            "on plain attention in small chunks, and with its defaults (CPU kernels, fast forwards). The same was done "
            "with weights of",
            "bfloat16 and of float16. There, another token is right only where rounding decides: where a float32 "
            "reading of the same",
            "weights has the two tokens' logits as near as a few times what stock's own logits are off. One prompt of "
            "the three may",
            "differ by more, as rounding may choose other experts.",
            "",
            f"Made {datetime.date.today().isoformat()} by `python -m paged_coverage --out docs/coverage.md` with "
            f"paged-core {version('paged-core')},",
            f"transformers {version('transformers')}, torch {version('torch')}, Python {platform.python_version()}.",
            "",
            f"| model type | class | tier | {' | '.join(_HALVES)} | attention, or why it isn't native |",
            f"|---|---|---{'|---' * len(_HALVES)}|---|",
            *(f"| {' | '.join(_cells(row))} |" for row in rows),
            "",
        ]
    )


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    return {tier: sum(row.tier == tier for row in rows) for tier in TIERS}


def _cells(row: Row) -> list[str]:
    halves = [*row.halves, *[""] * len(_HALVES)][: len(_HALVES)]
    return [row.model_type, row.class_name, row.tier, *halves, _cell(row.reason)]


def _cell(reason: str) -> str:
    """Short enough for a table, and no markup by accident."""
    short = reason if len(reason) <= 200 else reason[:197] + "..."
    return short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")

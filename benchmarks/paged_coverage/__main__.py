"""``python -m paged_coverage``: on which tier every causal language model of the installed transformers runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from paged_serving import quiet_imports


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns 1 if a model's answer differs from stock's, else 0."""
    args = _parser().parse_args(argv)
    quiet_imports()
    from paged_coverage import table
    from paged_coverage.check import WRONG, check
    from paged_coverage.isolated import check_all
    from paged_coverage.tiny import model_types

    wanted = args.only or model_types()
    unknown = sorted(set(wanted) - set(model_types()))
    if unknown:
        print(f"paged_coverage: transformers has no causal model called {', '.join(unknown)}", file=sys.stderr)
        return 2
    rows = []
    for row in check_all(wanted, check, args.jobs, args.timeout):
        rows.append(row)
        print(f"{len(rows):3}/{len(wanted)}  {table.line(row, wanted)}", flush=True)
    print(f"\n{table.summary(rows)}")
    if args.out:
        args.out.write_text(table.markdown(rows), encoding="utf-8")
    return int(any(row.tier == WRONG for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m paged_coverage",
        description="Try every causal language model of the installed transformers, each as a tiny model of random "
        "weights in a process of its own, and print on which tier it runs: native, second tier, stock or not built. "
        "The exit code is 1 if one answers otherwise than stock. All of them take some minutes.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", type=_names, metavar="LIST", help="model types, as in llama,gpt2 (default: all)")
    which.add_argument("--out", type=Path, metavar="FILE", help="write the table as Markdown, too: docs/coverage.md")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at once; default: 1")
    parser.add_argument(
        "--timeout", type=float, default=180, metavar="SECONDS", help="of one step of one model; default: 180"
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in dict.fromkeys(text.split(",")) if name]


if __name__ == "__main__":
    sys.exit(main())

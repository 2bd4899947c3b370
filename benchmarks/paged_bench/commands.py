"""``paged bench``: its options. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from paged_core import Commands
from paged_hf.commands import add_engine, add_model
from paged_serving import engine_config, quiet_imports, whole_number


def register(commands: Commands) -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser(
        "bench",
        help="compare speed, memory and tokens with stock Hugging Face, on the CPU",
        description="Answer the same requests with paged-core and with stock Hugging Face, on the CPU, and compare.",
    )
    add_model(parser)
    _add_workload(parser)
    _add_runs(parser)
    add_engine(parser, device=False)  # memory and stock code are measured on the CPU
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="PATH", help="write all numbers as JSON")
    out.add_argument("--plot", type=Path, metavar="PATH", help="write a chart (needs matplotlib)")
    parser.set_defaults(run=bench)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("workload (default: 64 seeded requests, all at once)")
    source = work.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help='one prompt per line, or .jsonl of {"prompt", "max_tokens"}'
    )
    work.add_argument(
        "--requests", type=whole_number, metavar="N", help="number of requests (default: 64; of a file, all)"
    )
    work.add_argument(
        "--rate", type=_positive, metavar="R", help="requests that arrive per second (default: all at once)"
    )
    work.add_argument("--time-scale", type=_positive, metavar="X", help="multiply the arrival times of a trace by X")
    work.add_argument(
        "--shared-prefix", type=whole_number, metavar="N", help="begin all prompts with the same N tokens"
    )
    work.add_argument(
        "--n",
        type=whole_number,
        default=1,
        metavar="N",
        help="samples per request (default: 1); more than one are drawn at temperature 1",
    )
    work.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of prompts, arrivals and draws (default: 0)"
    )


def _add_runs(parser: argparse.ArgumentParser) -> None:
    runs = parser.add_argument_group("runs")
    runs.add_argument(
        "--baseline",
        default="hf-static:16,hf-sequential",
        metavar="LIST",
        help="systems to compare with: hf-sequential, hf-static:SIZE, hf-continuous, paged-generate (the patched "
        "model.generate, one thread per request), paged-unshared (no prefix cache) (default: %(default)s)",
    )
    runs.add_argument(
        "--repeats",
        type=whole_number,
        default=3,
        metavar="N",
        help="runs of each system; medians are shown (default: %(default)s)",
    )
    runs.add_argument(
        "--quick", action="store_true", help="run each baseline once, with a run of paged before and after"
    )
    runs.add_argument(
        "--sequential-limit",
        type=_positive,
        metavar="SECONDS",
        help="if hf-sequential would take longer, run only every k-th request (default: 120; with --quick 15)",
    )


def bench(args: argparse.Namespace) -> int:
    """Run the A/B, show the table, write the files."""
    quiet_imports()
    from paged_bench import ab

    return ab.main(args, engine_config(args))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a positive number")
    return value

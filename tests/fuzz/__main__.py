"""Runs episodes for a time or a number of operations, shrinks a failing one, and prints how to reproduce it."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from fuzz.alone import Alone
from fuzz.episode import Episode

OPERATIONS = 500  # of an episode
_SHRINKING_S = 300.0  # at most, for shrinking


def fuzz(seed: int, first: int, until, tell=lambda counts: None) -> tuple[Counter[str], str | None]:
    """Run episodes ``first``, ``first + 1``, ... until ``until(counts)``. Returns counts of what happened, and the
    failure or None."""
    counts: Counter[str] = Counter()
    alone, number = Alone(), first
    while not until(counts):
        error = failure(seed, number, range(OPERATIONS), alone, counts)
        if error is not None:
            return counts, told(seed, number, range(OPERATIONS), alone)
        counts["episodes"] += 1
        tell(counts)
        number += 1
    return counts, None


def failure(
    seed: int, number: int, places: Sequence[int], alone: Alone | None = None, counts: Counter[str] | None = None
) -> str | None:
    """Run an episode. Returns its failure as a traceback, or None."""
    try:
        Episode(seed, number, alone or Alone(), counts if counts is not None else Counter()).run(places)
    except Exception:
        return traceback.format_exc()
    return None


def shrunk(seed: int, number: int, places: Sequence[int], alone: Alone) -> list[int]:
    """Return a smaller list of operations with which the episode still fails. Ever smaller pieces are left out, the
    latest first."""
    left, size, until = list(places), len(places), time.monotonic() + _SHRINKING_S
    while size:
        stop = len(left)
        while stop > 0 and time.monotonic() < until:
            start = max(stop - size, 0)
            fewer = left[:start] + left[stop:]
            if failure(seed, number, fewer, alone) is not None:
                left = fewer
            stop = start
        size //= 2
    return left


def told(seed: int, number: int, places: Sequence[int], alone: Alone) -> str:
    places = shrunk(seed, number, places, alone)
    only = ",".join(map(str, places)) or "none"
    error = failure(seed, number, places, alone)
    return f"{error}\nsee it again: python -m fuzz --seed {seed} --episode {number} --only {only}"


def figures(counts: Counter[str], seconds: float) -> str:
    lines = [f"{count:>10,}  {what}" for what, count in sorted(counts.items())]
    return "\n".join([*lines, f"{seconds:>10,.0f}  seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other episodes")
    parser.add_argument("--operations", type=int, default=50_000, help="stop after so many (default: 50000)")
    parser.add_argument("--hours", type=float, default=None, help="stop after so many hours instead")
    parser.add_argument("--episode", type=int, default=0, help="the first episode")
    parser.add_argument("--figures", type=Path, help="a file that has the counts until now, all the time")
    parser.add_argument("--only", help="run one episode: these operations of it, comma-separated")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if args.only is not None:
        places = [int(place) for place in args.only.split(",")] if args.only != "none" else []
        error = failure(args.seed, args.episode, places)
        print(error or "nothing went wrong")
        return error is not None
    began = time.monotonic()

    def until(counts: Counter[str]) -> bool:
        if args.hours is not None:
            return time.monotonic() - began > args.hours * 3600
        return counts["operations"] >= args.operations

    def tell(counts: Counter[str]) -> None:
        if sys.stderr.isatty():
            print(f"\r{counts['operations']:,} operations", end="", file=sys.stderr)
        if args.figures:
            args.figures.write_text(figures(counts, time.monotonic() - began))

    counts, error = fuzz(args.seed, args.episode, until, tell)
    print(figures(counts, time.monotonic() - began))
    print(error or "nothing went wrong")
    return error is not None


if __name__ == "__main__":
    sys.exit(main())

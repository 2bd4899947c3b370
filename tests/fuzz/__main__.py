"""Run episodes for a time or a number of operations; make what fails small, and say how to see it again."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence

import torch
from fuzz.alone import Alone
from fuzz.episode import Episode

OPERATIONS = 300  # of an episode


def fuzz(seed: int, first: int, until) -> tuple[Counter[str], str | None]:
    """Episodes ``first``, ``first + 1``, ... until ``until(counts)``. Returns what happened, and what went wrong."""
    counts: Counter[str] = Counter()
    alone, number = Alone(), first
    while not until(counts):
        error = failure(seed, number, range(OPERATIONS), alone, counts)
        if error is not None:
            return counts, told(seed, number, shrunk(seed, number), error)
        counts["episodes"] += 1
        number += 1
    return counts, None


def failure(
    seed: int, number: int, places: Sequence[int], alone: Alone | None = None, counts: Counter[str] | None = None
) -> str | None:
    """Run an episode: what went wrong, as a traceback; None: nothing."""
    try:
        Episode(seed, number, alone or Alone(), counts if counts is not None else Counter()).run(places)
    except Exception:
        return traceback.format_exc()
    return None


def shrunk(seed: int, number: int) -> list[int]:
    """The operations of an episode that fails, without those that it fails without: first the latest of them go, then
    ever smaller pieces."""
    places = list(range(OPERATIONS))
    size = len(places)
    while size:
        start = len(places) - size
        while start > -size:
            fewer = places[: max(start, 0)] + places[start + size :]
            if failure(seed, number, fewer) is not None:
                places = fewer
            start -= size
        size //= 2
    return places


def told(seed: int, number: int, places: Sequence[int], error: str) -> str:
    again = failure(seed, number, places) or error
    only = ",".join(map(str, places))
    return f"{again}\nsee it again: python -m fuzz --seed {seed} --episode {number} --only {only or 'none'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other episodes")
    parser.add_argument("--operations", type=int, default=50_000, help="stop after so many (default: 50000)")
    parser.add_argument("--hours", type=float, default=None, help="stop after so many hours instead")
    parser.add_argument("--episode", type=int, default=0, help="the first episode")
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

    counts, error = fuzz(args.seed, args.episode, until)
    for what, count in sorted(counts.items()):
        print(f"{count:>10,}  {what}")
    print(f"{time.monotonic() - began:>10,.0f}  seconds")
    print(error or "nothing went wrong")
    return error is not None


if __name__ == "__main__":
    sys.exit(main())

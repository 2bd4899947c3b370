"""A server's memory over thousands of requests, what its clients see when it is killed, and what one of them feels
beside others that mean harm.

    python benchmarks/bench_reliability.py memory MODEL --requests 10000
    python benchmarks/bench_reliability.py kill MODEL --clients 16
    python benchmarks/bench_reliability.py flood MODEL --clients 16
    python benchmarks/bench_reliability.py bombs MODEL --rate 4
    python benchmarks/bench_reliability.py probes MODEL --rate 4 --json FILE

MODEL is whatever ``paged serve`` takes. The requests of ``memory`` are of all kinds: whole answers, streams, several
samples, clients that leave in the middle, bodies that are refused. ``flood`` is clients that submit and leave in a
loop; ``bombs`` are schemas that take seconds to compile, no two the same. Beside both a neighbour reads streams, and it
reads as many alone, in turns: told are the times between two of its events. ``probes`` asks for /health and for a
completion of one token, alone and beside bombs in turns, and tells how long each took and what bombs add at the most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from paged_bench.report import cpu_name
from paged_bench.results import percentile
from reliability_clients import LONG, Seen, Trouble, ask, beside, bombs, flood, probe, read_stream, serving


def main() -> int:
    measure = {"memory": measure_memory, "kill": measure_kill, "flood": measure_flood, "bombs": measure_bombs,
               "probes": measure_probes}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(measure))
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000, help="of memory")
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--max-queue", type=int, default=8, help="of the server, for flood")
    parser.add_argument("--rate", type=float, default=4.0, help="bombs a second")
    parser.add_argument("--rounds", type=int, default=5, help="alone and beside, for flood, bombs and probes")
    parser.add_argument("--probes", type=int, default=50, help="of each round, alone and beside")
    parser.add_argument("--tokens", type=int, default=100, help="of each stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the result goes there too")
    args = parser.parse_args()
    told = json.dumps({**_about(), **measure[args.what](args)}, indent=2)
    print(told)
    if args.json is not None:
        args.json.write_text(told + "\n")
    return 0


def _about() -> dict[str, Any]:
    command = shlex.join(["python", "benchmarks/bench_reliability.py", *sys.argv[1:]])
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command, "cpu": cpu_name()}


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """The resident memory of the server's process, ten times on the way."""
    tenth = max(args.requests // 10, 1)
    with serving(args.model) as (process, port), ThreadPoolExecutor(args.clients) as pool:
        told: Counter[str] = Counter()
        rss_mb = [_rss_mb(process)]
        began = time.monotonic()
        for first in range(0, args.requests, tenth):
            seeds = [f"{args.seed}.{number}" for number in range(first, first + tenth)]
            told.update(pool.map(lambda seed: ask(port, random.Random(seed)), seeds))
            rss_mb.append(_rss_mb(process))
            print(f"{first + tenth}: {rss_mb[-1]} MB", file=sys.stderr, flush=True)
        seconds = round(time.monotonic() - began)
    return {"requests": told.total(), "answers": dict(told), "rss_mb": rss_mb, "seconds": seconds}


def measure_kill(args: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL while every client reads a stream: how each stream ended, and when; when the next server answers."""
    with serving(args.model) as (process, port), ThreadPoolExecutor(args.clients) as pool:
        streams = [pool.submit(read_stream, port, LONG) for _ in range(args.clients)]
        time.sleep(2)
        killed_at = time.monotonic()
        process.send_signal(signal.SIGKILL)
        seen = [stream.result() for stream in streams]
        process.wait()
        with serving(args.model, port):
            again_s = time.monotonic() - killed_at
            after = read_stream(port, 5)
    return {
        "clients": args.clients,
        "events_before": sum(each.num_events for each in seen),
        "ends": Counter(each.end for each in seen),
        "told_after_ms": round(1000 * max(each.at - killed_at for each in seen), 1),
        "next_server_on_the_port_answers_after_s": round(again_s, 1),
        "its_stream_ends_with": after.end,
    }


def measure_flood(args: argparse.Namespace) -> dict[str, Any]:
    """A neighbour's streams, alone and beside clients that submit and leave in a loop."""
    with serving(args.model, options=["--max-queue", str(args.max_queue)]) as (_, port):
        return neighbour(args, port, flood, args.clients)


def measure_bombs(args: argparse.Namespace) -> dict[str, Any]:
    """A neighbour's streams, alone and beside schemas that take seconds to compile."""
    with serving(args.model) as (_, port):
        return neighbour(args, port, bombs, args.rate)


def measure_probes(args: argparse.Namespace) -> dict[str, Any]:
    """Looks at /health and small completions, alone and beside schemas that take seconds to compile."""
    alone: list[dict[str, float]] = []
    troubled: list[dict[str, float]] = []
    outcomes: Counter[str] = Counter()
    load = os.getloadavg()[0]
    with serving(args.model) as (_, port):
        probe(port)  # what is done once
        for _ in range(args.rounds):
            alone += [probe(port) for _ in range(args.probes)]
            with beside(bombs, port, args.rate) as told:
                troubled += [probe(port) for _ in range(args.probes)]
            outcomes += told
    about = {"cores": os.cpu_count(), "load_before": load, "probes": args.probes, "rounds": args.rounds}
    return {**about, **{name: _waits(name, alone, troubled) for name in alone[0]}, "of_the_others": dict(outcomes)}


def _waits(name: str, alone: Sequence[dict[str, float]], troubled: Sequence[dict[str, float]]) -> dict[str, Any]:
    waits = {"alone": [each[name] for each in alone], "beside": [each[name] for each in troubled]}
    found: dict[str, Any] = {
        where: {"p50": round(median(ms), 1), "p99": round(percentile(ms, 99), 1), "worst": round(max(ms), 1)}
        for where, ms in waits.items()
    }
    return {**found, "added_at_most_ms": round(found["beside"]["worst"] - found["alone"]["p50"], 1)}


def neighbour(args: argparse.Namespace, port: int, trouble: Trouble, how_much: float) -> dict[str, Any]:
    """What a client of the server on that port feels, alone and beside trouble, in turns."""
    alone: list[Seen] = []
    troubled: list[Seen] = []
    outcomes: Counter[str] = Counter()
    load = os.getloadavg()[0]
    read_stream(port, 10)  # what is done once
    for _ in range(args.rounds):
        alone.append(read_stream(port, args.tokens))
        with beside(trouble, port, how_much) as told:
            troubled.append(read_stream(port, args.tokens))
        outcomes += told
    about = {"cores": os.cpu_count(), "load_before": load, "tokens": args.tokens, "rounds": args.rounds}
    return {**about, "alone": _felt(alone), "beside": _felt(troubled), "of_the_others": dict(outcomes)}


def _felt(streams: Sequence[Seen]) -> dict[str, Any]:
    gaps_ms = [gap for each in streams for gap in each.gaps_ms]
    return {
        "ends": dict(Counter(each.end for each in streams)),
        "tokens": sum(each.num_tokens for each in streams),
        "events": sum(each.num_events for each in streams),
        "first_ms": [round(each.first_ms, 1) for each in streams],
        "gap_ms": {"p50": round(median(gaps_ms), 1), "p99": round(percentile(gaps_ms, 99), 1)},
        "worst_gap_ms": [round(max(each.gaps_ms), 1) for each in streams],
    }


def _rss_mb(process: subprocess.Popen[bytes]) -> int:
    return int(psutil.Process(process.pid).memory_info().rss) // 1_000_000


if __name__ == "__main__":
    sys.exit(main())

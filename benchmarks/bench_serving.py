"""A server under load: throughput, latencies, goodput, errors; and the cost of HTTP.

    python benchmarks/bench_serving.py --url http://127.0.0.1:8000 [--backend openai] [--model NAME] [--rate 4]
    python benchmarks/bench_serving.py --url URL --compare-url OTHER      # do both choose the same words?
    python benchmarks/bench_serving.py --in-process smollm2 --concurrency 64 --requests 128      # the cost of HTTP

Requests are greedy: those of ``paged bench`` (prompts of 52 tokens, outputs of 109 in the mean), or of a trace. They
come all at once, ``--rate`` a second (Poisson), or at the trace's times; at most ``--concurrency`` are open at once.
Without --url, --in-process drives an AsyncEngine in this process and a ``paged serve`` of its own in turn, so that one
command measures the cost of HTTP. The client uses the same cores, and its time is part of that cost.

With the openai backends an answer continues after the end token, in process too, unless --extra removes ignore_eos.
TGI's protocol has no such field, so with it every system ends there.

first token: from arrival to the first piece. next token: from piece to piece of one answer. goodput: requests a second
that met both --slo-ttft and, in their mean, --slo-itl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from paged_bench.progress import Progress
from paged_bench.workloads import Workload, from_trace, synthetic, with_poisson_arrivals
from paged_core import settle_threads
from paged_hf import embedded_folder
from serving_clients import PATHS, Ask, EngineTarget, HTTPTarget, TestedServer, TimedAnswer, drive, ignores_eos, read
from serving_results import Row, compared, show, summarise


def main() -> int:
    settle_threads()  # as the server's are
    args = _arguments()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asks, workload = make_asks(args)
    rows: dict[str, list[Row]] = {}
    answers: dict[str, list[TimedAnswer]] = {}
    with _targets(args) as targets, Progress("req") as progress:
        for round_number in range(args.repeats):
            for name, target in targets.items():
                told = _told(progress, f"{name} {round_number + 1}/{args.repeats}", len(asks))
                answers[name], duration_s, cpu_s = _driven(target, asks, args.concurrency, told)
                row = summarise(answers[name], duration_s, args.slo_ttft, args.slo_itl)
                rows.setdefault(name, []).append({**row, "cpu_us_per_token": _per_token(cpu_s, answers[name])})
                print(f"{name}: {rows[name][-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
    result = {"systems": rows, **compared(rows, answers), **_about(args, workload)}
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if any(row["num_errors"] for each in rows.values() for row in each) else 0


def _driven(
    target: TestedServer, asks: Sequence[Ask], concurrency: int | None, told: Any
) -> tuple[list[TimedAnswer], float, dict[str, float]]:
    """The answers, the run's seconds, and seconds of processor time by who took them."""
    before = _cpu_s(target)
    answers, duration_s = asyncio.run(drive(target, asks, concurrency, told))
    taken = {who: after - before[who] for who, after in _cpu_s(target).items()}
    return [read(answer) for answer in answers], duration_s, taken


def _cpu_s(target: TestedServer) -> dict[str, float]:
    """The client's is this thread's: it sends, and notes when what comes. Of a server that is ours: its event loop's
    ("loop", which does what HTTP costs), and all its threads' ("server")."""
    taken = {"client": time.thread_time()}
    if target.pid is not None:
        threads = {each.id: each.user_time + each.system_time for each in psutil.Process(target.pid).threads()}
        taken |= {"loop": threads[target.pid], "server": sum(threads.values())}
    return taken


def _per_token(cpu_s: dict[str, float], answers: Sequence[TimedAnswer]) -> dict[str, float]:
    num_tokens = max(1, sum(answer.num_tokens for answer in answers))
    return {who: round(1e6 * seconds / num_tokens, 1) for who, seconds in cpu_s.items()}


def make_asks(args: argparse.Namespace) -> tuple[list[Ask], Workload]:
    from transformers import AutoTokenizer

    name = args.tokenizer or args.in_process or "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder() if name == "smollm2" else name)
    if args.trace:
        work = from_trace(tokenizer.encode, args.trace, args.requests, args.rate, args.time_scale, args.seed)
    else:
        work = synthetic(tokenizer.encode, args.requests, args.seed)
        work = with_poisson_arrivals(work, args.rate, args.seed) if args.rate else work
    asks = []
    for each in work.requests:
        ids = each.prompt[: args.max_prompt_tokens]
        num_output = min(each.num_output, args.max_output_tokens or each.num_output)
        asks.append(Ask(each.index, tokenizer.decode(ids), ids, num_output, each.arrival_s))
    return asks, work


@contextmanager
def _targets(args: argparse.Namespace) -> Iterator[dict[str, TestedServer]]:
    if args.url:
        targets = {args.url: _endpoint(args, args.url, args.model)}
        if args.compare_url:
            name = f"{args.compare_url} again" if args.compare_url == args.url else args.compare_url
            targets[name] = _endpoint(args, args.compare_url, args.model)
        yield targets
        return
    from paged_core import AsyncEngine, EngineConfig

    config = EngineConfig(kv_cache_bytes=args.kv_bytes, enable_prefix_caching=False)
    with AsyncEngine(args.in_process, config=config) as engine, _own_server(args) as (url, pid):
        server = _endpoint(args, url, args.in_process)
        server.pid = pid
        short = [Ask(0, "A", (1, 2, 3), 2)]
        targets = {"in-process": EngineTarget(engine, ignores_eos(args.backend, args.extra)), "http": server}
        for target in targets.values():  # compiles the remaining kernels
            asyncio.run(drive(target, short, None, lambda _: None))
        yield targets


def _endpoint(args: argparse.Namespace, url: str, model: str | None) -> HTTPTarget:
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    return HTTPTarget(url, args.backend, model, key, args.extra)


@contextmanager
def _own_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "paged_core", "serve", args.in_process, "--port", str(port),
               "--no-prefix-caching", "--kv-bytes", str(args.kv_bytes), "--log-level", "warning"]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        while server.poll() is None and not _is_ready(url):
            time.sleep(0.2)
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(60)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _told(progress: Progress, what: str, total: int) -> Any:
    return lambda num_done: progress(what, num_done, total)


def _about(args: argparse.Namespace, workload: Workload) -> Row:
    from paged_bench.report import cpu_name

    packages = ("paged-core", "torch", "transformers", "uvicorn", "starlette")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/bench_serving.py", *sys.argv[1:]]),
        "workload": [workload.description, *workload.notes],
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "slo": {"ttft_s": args.slo_ttft, "itl_s": args.slo_itl},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", help="the server's root")
    add("--compare-url", help="a second server, asked the same in turn")
    add("--in-process", metavar="MODEL", help="an engine in this process, and a server of its own beside it")
    add("--backend", choices=sorted(PATHS), default="openai")
    add("--model", help="the name that requests ask for (default: none; many servers want one)")
    add("--tokenizer", metavar="MODEL", help="that prompts are measured with (default: the model's, or smollm2's)")
    add("--api-key-env", metavar="VARIABLE", help="the environment variable that holds the key")
    add(
        "--extra",
        type=json.loads,
        metavar="JSON",
        help='more fields of each body; null drops one: {"ignore_eos": null}',
    )
    add("--requests", type=int, default=64)
    add("--rate", type=float, help="requests a second, Poisson; of a trace, on average")
    add("--trace", type=Path, help="a CSV of TIMESTAMP, ContextTokens, GeneratedTokens")
    add("--time-scale", type=float, default=1.0, help="stretches the trace's arrivals")
    add("--concurrency", type=int, help="open at once, at most (default: as they come)")
    add("--max-prompt-tokens", type=int, help="prompts are cut to it")
    add("--max-output-tokens", type=int, help="outputs are cut to it")
    add("--slo-ttft", type=float, default=1.0, metavar="S")
    add("--slo-itl", type=float, default=0.1, metavar="S")
    add("--repeats", type=int, default=1, help="of each system, in turn")
    add("--kv-bytes", type=int, default=1_500_000_000, help="of each engine of --in-process")
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    args = parser.parse_args()
    if bool(args.url) == bool(args.in_process):
        parser.error("give --url or --in-process")
    if args.compare_url and not args.url:
        parser.error("--compare-url goes with --url")
    if args.trace and not args.trace.is_file():
        parser.error(f"{args.trace} isn't a file")
    return args


if __name__ == "__main__":
    sys.exit(main())

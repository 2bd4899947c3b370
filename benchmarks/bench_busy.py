"""Throughput on shared processors: tokens per second beside other processes, and under the quota of a control group.

    python benchmarks/bench_busy.py [MODEL] [--json PATH]

Each way of waiting runs in its own processes: "paged" as paged's commands set it (paged_core/processors.py), "torch"
as torch starts without them, "passive" with OMP_WAIT_POLICY=passive, "one thread". Each result comes with its share of
the same way's result alone, and with the fair share of the processors: the quota's, or an even scheduler's beside so
many busy processes. The quota needs a writable control group (root); without one it is left out, with a message. Takes
about four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, str]] = {
    "paged": {},
    "torch": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
NEW_TOKENS = 20
PERIOD = 100_000  # microseconds, of a quota
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


def main() -> None:
    args = parse_args()
    if args.worker is not None:
        work(args.model, args.worker)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that started processes are ended
    processors = len(os.sched_getaffinity(0))
    results: list[dict[str, Any]] = []
    with quota_group(args.quota) as group:
        if isinstance(group, str):
            print(f"no quota: {group}", flush=True)
        for way in args.ways.split(","):
            for found in measure(way, group, processors, args):
                results.append(found)
                print(
                    f"{way:>10} {found['rows']:3d} rows {found['where']:>12}: {found['tokens_per_s']:7.1f} tokens/s, "
                    f"{found['of_alone']:4.0%} of alone (its share: {found['share']:.0%})",
                    flush=True,
                )
    if args.json:
        about = {"date": date.today().isoformat(), "cpu": cpu(), "processors": processors, "model": args.model}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--ways", default=",".join(WAYS), help="by commas")
    parser.add_argument("--rows", default="1,16", help="requests at once, by commas")
    parser.add_argument("--busy", default="1,2", help="processes beside it, by commas")
    parser.add_argument("--quota", type=float, default=1.0, help="processors")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(way: str, group: Path | str, processors: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure alone, then beside others, then in the control group, if there is one."""
    rows = [int(n) for n in args.rows.split(",")]
    alone: dict[int, float] = {}
    with worker(way, None, args) as process:
        threads = 1 if way == "one thread" else processors
        for busy in (0, *(int(n) for n in args.busy.split(","))):
            with others(busy) if busy else nullcontext():
                for num_rows in rows:
                    rate = ask(process, num_rows, args.repeats)
                    alone.setdefault(num_rows, rate)
                    share = min(1.0, processors / (threads + busy))
                    yield told(way, f"{busy} busy" if busy else "alone", num_rows, rate, alone[num_rows], share)
    if isinstance(group, Path):
        with worker(way, group, args) as process:
            for num_rows in rows:
                share = min(1.0, args.quota / threads)
                rate = ask(process, num_rows, args.repeats)
                yield told(way, f"quota {args.quota:g}", num_rows, rate, alone[num_rows], share)


def told(way: str, where: str, rows: int, rate: float, alone: float, share: float) -> dict[str, Any]:
    return {"way": way, "where": where, "rows": rows, "tokens_per_s": rate, "of_alone": rate / alone, "share": share}


# ---- the process that is measured ---------------------------------------------------------------------------------


def work(model: str, way: str) -> None:
    """Answer each number of rows on a line with tokens a second."""
    if way == "paged":
        from paged_core.processors import settle_threads

        settle_threads()
    from paged_core import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", enable_prefix_caching=False, kv_cache_bytes=200_000_000)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for line in sys.stdin:
        prompts: Any = [{"prompt_token_ids": [100 + 7 * i + j for j in range(20)]} for i in range(int(line))]
        start = time.perf_counter()
        llm.generate(prompts, params)
        print("tokens/s", len(prompts) * NEW_TOKENS / (time.perf_counter() - start), flush=True)


@contextmanager
def worker(way: str, group: Path | None, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, args.model, "--worker", way]
    if group is not None:
        command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    process = subprocess.Popen(
        command, env={**clean, **WAYS[way]}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        ask(process, 16, 1)
        ask(process, 1, 1)
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], rows: int, repeats: int) -> float:
    rates = []
    assert process.stdin is not None and process.stdout is not None
    for _ in range(repeats):
        process.stdin.write(f"{rows}\n")
        process.stdin.flush()
        line = next((line for line in process.stdout if line.startswith("tokens/s")), None)
        if line is None:
            raise SystemExit("the process that is measured has ended; run it by hand with --worker to see why")
        rates.append(float(line.split()[1]))
    return statistics.median(rates)


# ---- what it shares processors with -------------------------------------------------------------------------------


@contextmanager
def others(count: int) -> Iterator[None]:
    """So many processes that each keep a processor busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def quota_group(processors: float) -> Iterator[Path | str]:
    """A control group (version 1 or 2) with a quota of so many processors, or the reason why there is none."""
    is_v1 = (V1 / "cpu.cfs_quota_us").exists()
    group = (V1 if is_v1 else V2) / f"paged-bench-{os.getpid()}"
    quota = round(PERIOD * processors)
    try:
        group.mkdir()
    except OSError as error:
        yield str(error)
        return
    try:
        if is_v1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
    except OSError as error:
        yield str(error)
    else:
        yield group
    finally:
        group.rmdir()


def cpu() -> str:
    from paged_bench.report import cpu_name

    return cpu_name()


if __name__ == "__main__":
    main()

"""The time of scheduling alone: schedule() and update() per step, without a model.

    python benchmarks/bench_scheduler.py [--requests 256] [--tokens 4096] [--steps 200] [--json PATH]

The target: 256 running requests of 4,096 tokens under 1 ms a step on one core. Batch building (tensors for the model)
is timed beside it.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from paged_core.execution.batch import BatchBuilder
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.request import Request, Selection
from paged_core.scheduling.schedule import Limits
from paged_core.scheduling.scheduler import Scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each request when the timing starts")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    result = measure(args.requests, args.tokens, args.steps, args.block_size)
    print(f"{args.requests} running requests of {args.tokens} tokens, median of {args.steps} decode steps:")
    for name in ("schedule", "update", "scheduling", "build_batch"):
        print(f"  {name:12} {result[name + '_ms']:.3f} ms")
    if args.json:
        args.json.write_text(
            json.dumps(
                result
                | {
                    "machine": platform.processor() or platform.machine(),
                    "python": platform.python_version(),
                    "date": str(date.today()),
                },
                indent=2,
            )
        )


def measure(num_requests: int, num_tokens: int, num_steps: int, block_size: int) -> dict[str, float]:
    max_len = num_tokens + num_steps + 8
    pool = BlockPool(num_requests * (-(-max_len // block_size) + 1), block_size)
    scheduler = Scheduler(pool, Fcfs(), Limits(num_requests, num_requests * num_tokens, max_len, 0, 256))
    builder = BatchBuilder(block_size, torch.device("cpu"))
    params = SamplingParams(max_tokens=num_steps + 4)
    for i in range(num_requests):
        prompt = [(i * 7 + p) % 50_000 for p in range(num_tokens)]
        scheduler.add([Request(str(i), prompt, params, stop_token_ids=frozenset({50_001}))])
    times: dict[str, list[float]] = {"schedule": [], "build_batch": [], "update": []}
    for _ in range(num_steps + 1):
        marks = [time.perf_counter()]
        schedule = scheduler.schedule()
        marks.append(time.perf_counter())
        batch = builder.build(schedule)
        marks.append(time.perf_counter())
        selection = Selection([7] * len(batch.sample_requests))
        began = time.perf_counter()
        scheduler.update(schedule, selection)
        marks.append(marks[-1] + time.perf_counter() - began)
        for name, a, b in zip(times, marks, marks[1:], strict=False):
            times[name].append(b - a)
    result = {f"{name}_ms": statistics.median(values[1:]) * 1e3 for name, values in times.items()}
    result["scheduling_ms"] = (
        statistics.median(a + b for a, b in zip(times["schedule"][1:], times["update"][1:], strict=True)) * 1e3
    )
    return result


if __name__ == "__main__":
    main()

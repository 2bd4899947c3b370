"""K/V on disk against none: after a restart, when blocks run out, on a slow disk, and when nothing is ever loaded.

    python benchmarks/bench_tiers.py [--model smollm2] [--folder DIR] [--repeats 5] [--parts restart,...] [--json PATH]

Every ratio is of one run, both sides taken in turn; times are medians. The files are in the system's page cache, as
they are after a restart of the process; a machine that was restarted reads them from the disk itself. Seconds of the
processor, in which nothing counts that other programs take, say what a step costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from paged_core import Engine, EngineConfig, SamplingParams
from paged_core.scheduling.schedule import Schedule
from paged_core.tiers.slab import Slab

_PREFIXES = (512, 2000)
_BESIDE = 1024
_SLOW_BYTES_PER_S = 20e6
_CALLS = 20_000


def main() -> None:
    parts: dict[str, Callable[[Any, Path, int], dict[str, Any]]] = {
        "restart": restart, "beside": beside, "unused": unused, "crowded": crowded, "slow disk": slow_disk,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--folder", type=Path, help="where the blocks go (default: a new one in TMPDIR)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default=",".join(parts), help="some of: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = Engine(args.model, EngineConfig(num_blocks=8))._model  # loaded once: engines are built on it
    result: dict[str, Any] = {
        "model": args.model, "date": str(date.today()), "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(), "load": os.getloadavg()[0], "repeats": args.repeats,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.parts.split(","):
            result[name] = parts[name](model, Path(folder) / name.replace(" ", "-"), args.repeats)
            print(name, json.dumps(result[name], indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def restart(model: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """The first token of a prompt whose prefix an engine that is gone has computed."""
    found: dict[str, Any] = {}
    for length in _PREFIXES:
        prefix = _tokens(model, length, seed=length)
        engine = _engine(model, folder)
        _first_token_s(engine, prefix)
        engine.close(60.0)
        times: dict[str, list[float]] = {"without": [], "with": []}
        for i in range(repeats):
            for side in times:
                engine = _engine(model, folder if side == "with" else None)
                _first_token_s(engine, _tokens(model, 20, seed=-i - 1))  # kernels and memory are warm
                times[side].append(_first_token_s(engine, [*prefix, *_tokens(model, 8, seed=i)]))
                engine.close(0.0)
        medians = {side: statistics.median(values) * 1e3 for side, values in times.items()}
        found[str(length)] = {
            "without_ms": round(medians["without"], 1), "with_ms": round(medians["with"], 1),
            "times_as_quick": round(medians["without"] / medians["with"], 1),
        }  # fmt: skip
    return found


def beside(model: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """The same from a disk that is as slow as computing: the tail is loaded while the head is computed."""
    prefix = _tokens(model, _BESIDE, seed=1)
    engine = _engine(model, folder)
    _first_token_s(engine, prefix)
    engine.close(60.0)
    times: dict[str, list[float]] = {"computed": [], "loaded": [], "both": []}
    for i in range(repeats):
        for side in times:
            engine = _engine(model, folder if side != "computed" else None)
            _first_token_s(engine, _tokens(model, 256, seed=7000 + i))
            costs = engine._offloading._costs
            assert costs.tokens_per_s is not None
            costs.bytes_per_s = rate = costs.tokens_per_s * costs._block_bytes / engine.sizes.block_size
            if side == "loaded":
                costs.pays_beside = lambda num_blocks, num_tokens: False  # type: ignore[method-assign]
                costs.patience_s = lambda num_tokens: 1e9  # type: ignore[method-assign]
            with _slowed(rate):
                times[side].append(_first_token_s(engine, [*prefix, *_tokens(model, 8, seed=i)]))
            engine.close(0.0)
    medians = {f"{side}_ms": round(statistics.median(values) * 1e3, 1) for side, values in times.items()}
    return medians | {"times_as_quick": round(medians["computed_ms"] / medians["both_ms"], 2)}


def unused(model: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """Steps that decode 16 rows, of an engine with a tier that is never used and one without, in turn; and what is
    called in each step for a tier's sake, by itself."""
    engines = {"without": _engine(model, None), "with": _engine(model, folder)}
    for engine in engines.values():
        for row in range(16):
            _add(engine, _tokens(model, 20, seed=row), 40 * repeats + 20)
        for _ in range(10):
            engine.step()
    steps: dict[str, list[float]] = {side: [] for side in engines}
    for _ in range(40 * repeats):
        for side, engine in engines.items():
            began = time.process_time()
            engine.step()
            steps[side].append(time.process_time() - began)
    calls = {side: _calls_s(engine) for side, engine in engines.items()}
    for engine in engines.values():
        engine.close(0.0)
    step_s = statistics.median(steps["without"])
    ratios = [a / b for a, b in zip(steps["with"], steps["without"], strict=True)]
    return {
        "step_cpu_ms": round(step_s * 1e3, 2),
        "overhead_percent": round((statistics.median(ratios) - 1) * 100, 2),
        "calls_cpu_us": round((calls["with"] - calls["without"]) * 1e6, 2),
        "calls_percent": round((calls["with"] - calls["without"]) / step_s * 100, 4),
    }


def _calls_s(engine: Engine) -> float:
    """What one step spends on its tiers, whether or not there are any."""
    offloading, scheduler, nothing = engine._offloading, engine._scheduler, Schedule((), (), ())
    began = time.process_time()
    for _ in range(_CALLS):
        offloading.take_up()
        offloading.carry_out(nothing)
        scheduler._given_up()
        offloading.measure(16, 16, 0.1)
        _ = offloading.stats
    return (time.process_time() - began) / _CALLS


def crowded(model: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """64 requests with blocks for 16 at once: who is preempted is loaded, or computed again."""
    return _crowd(model, folder, repeats)


def slow_disk(model: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """The same on a disk of 20 MB/s, at which nothing is worth loading."""
    with _slowed(_SLOW_BYTES_PER_S):
        return _crowd(model, folder, repeats)


def _crowd(model: Any, folder: Path, repeats: int) -> dict[str, Any]:
    prompts = [_tokens(model, 100, seed=row) for row in range(64)]
    rates: dict[str, list[float]] = {"without": [], "with": []}
    cpu: dict[str, list[float]] = {"without": [], "with": []}
    preempted = loaded = 0
    for i in range(repeats):
        for side in rates:
            path = folder / str(i) if side == "with" else None
            engine = _engine(model, path, num_blocks=16 * 150 // 8, max_num_seqs=64)
            for prompt in prompts:
                _add(engine, prompt, 60)
            began, began_cpu, num_tokens = time.perf_counter(), time.process_time(), 0
            while engine.has_work:
                num_tokens += sum(len(output.token_ids) for output in engine.step())
            rates[side].append(num_tokens / (time.perf_counter() - began))
            cpu[side].append((time.process_time() - began_cpu) / num_tokens)
            if side == "with":
                assert engine.last_stats is not None
                preempted += engine.last_stats.total_preemptions
                loaded += engine.last_stats.offloading.total_tokens_loaded
            engine.close(0.0)
    ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    return {
        "without_tokens_per_s": round(statistics.median(rates["without"]), 1),
        "with_tokens_per_s": round(statistics.median(rates["with"]), 1),
        "times_as_quick": round(statistics.median(ratios), 3),
        "without_cpu_ms_a_token": round(statistics.median(cpu["without"]) * 1e3, 2),
        "with_cpu_ms_a_token": round(statistics.median(cpu["with"]) * 1e3, 2),
        "preemptions_a_run": preempted / repeats,
        "tokens_loaded_a_run": loaded / repeats,
    }


@contextmanager
def _slowed(bytes_per_s: float) -> Iterator[None]:
    """As on a disk that reads and writes no more."""

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def slower(slab: Slab, *args: Any) -> Any:
            time.sleep(slab._shape.block_bytes / bytes_per_s)
            return function(slab, *args)

        return slower

    read, append = Slab.read, Slab.append
    Slab.read, Slab.append = slow(read), slow(append)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Slab.read, Slab.append = read, append  # type: ignore[method-assign]


def _engine(model: Any, folder: Path | None, **sizes: Any) -> Engine:
    path = {} if folder is None else {"kv_disk_path": str(folder)}
    return Engine(model, EngineConfig(**{"num_blocks": 600, "block_size": 8} | sizes | path))


def _add(engine: Engine, prompt: Sequence[int], max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(str(random.random()), prompt, params)


def _first_token_s(engine: Engine, prompt: Sequence[int]) -> float:
    _add(engine, prompt, 1)
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def _tokens(model: Any, num: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(model.spec.vocab_size) for _ in range(num)]


if __name__ == "__main__":
    main()

"""K/V on disk compared with none: after a restart, when blocks run out, on a slow disk, and when nothing is ever
loaded.

    python benchmarks/bench_tiers.py [--model smollm2] [--folder DIR] [--repeats 5] [--parts restart,...]
                                     [--kills 1000] [--damages 10000] [--json PATH]

Every ratio is of one run, both sides taken in turn; times are medians. The files are in the system's page cache, as
they are after a restart of the process; a machine that was restarted reads them from the disk itself. The cost of steps
and of crowded runs is also given in processor time, which excludes other programs. "worst" is a crowded run of a model
that computes a block about as fast as it is written (two layers of 128, random), with long prompts and a disk of 20
MB/s, so that writing never pays. "robustness" is scripts/tier_robustness.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from paged_core import Engine, EngineConfig, SamplingParams
from paged_core.scheduling.schedule import Schedule
from paged_core.tiers.slab import Slab
from paged_hf.loading.embedded import NAME, embedded_folder

_PREFIXES = (512, 2000)
_BESIDE = 1024
_SLOW_BYTES_PER_S = 20e6
_CALLS = 20_000
_ROBUSTNESS = Path(__file__).parent.parent / "scripts" / "tier_robustness.py"


def main() -> None:
    parts: dict[str, Callable[[Any, Path, argparse.Namespace], dict[str, Any]]] = {
        "restart": restart, "beside": beside, "unused": unused, "crowded": crowded, "slow disk": slow_disk,
        "worst": worst, "robustness": robustness,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--folder", type=Path, help="where the blocks go (default: a new one in TMPDIR)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--parts", default=",".join(parts), help="some of: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = embedded_folder() if args.model == NAME else args.model
    model = AutoModelForCausalLM.from_pretrained(source).eval()  # loaded once, for all engines
    result: dict[str, Any] = {
        "model": args.model, "date": str(date.today()), "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "repeats": args.repeats,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.parts.split(","):
            load = os.getloadavg()[0]
            result[name] = parts[name](model, Path(folder) / name.replace(" ", "-"), args) | {"load": round(load, 1)}
            print(name, json.dumps(result[name], indent=2), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def restart(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The time to the first token of a prompt whose prefix an earlier engine has computed."""
    found: dict[str, Any] = {}
    for length in _PREFIXES:
        prefix = _tokens(model, length, seed=length)
        engine = _engine(model, folder)
        _first_token_s(engine, prefix)
        engine.close(60.0)
        times: dict[str, list[float]] = {"without": [], "with": []}
        for i in range(args.repeats):
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


def beside(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same with a disk as slow as computing: the last blocks are loaded while the first tokens are computed."""
    prefix = _tokens(model, _BESIDE, seed=1)
    engine = _engine(model, folder)
    _first_token_s(engine, prefix)
    engine.close(60.0)
    times: dict[str, list[float]] = {"computed": [], "loaded": [], "both": []}
    for i in range(args.repeats):
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


def unused(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Steps that decode 16 rows, of an engine with an unused tier and of one without, in turn; and the time of the
    calls that a step makes for tiers."""
    engines = {"without": _engine(model, None), "with": _engine(model, folder)}
    for engine in engines.values():
        for row in range(16):
            _add(engine, _tokens(model, 20, seed=row), 40 * args.repeats + 20)
        for _ in range(10):
            engine.step()
    steps: dict[str, list[float]] = {side: [] for side in engines}
    for _ in range(40 * args.repeats):
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
    """The time that one step spends on tiers, whether or not there are any."""
    offloading, scheduler, nothing = engine._offloading, engine._scheduler, Schedule((), (), ())
    began = time.process_time()
    for _ in range(_CALLS):
        offloading.take_up()
        offloading.carry_out(nothing)
        scheduler._given_up()
        offloading.measure(16, 16, 0.1)
        _ = offloading.stats
    return (time.process_time() - began) / _CALLS


def crowded(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """64 requests with blocks for 16 at once: preempted requests are loaded, or computed again."""
    return _crowd(model, folder, args.repeats)


def slow_disk(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same on a disk of 20 MB/s, from which loading never pays."""
    with _slowed(_SLOW_BYTES_PER_S):
        return _crowd(model, folder, args.repeats)


def worst(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same with a model for which writing never pays; many times, as a run takes a second."""
    torch.manual_seed(0)
    quick = LlamaForCausalLM(LlamaConfig(vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096)).eval()  # fmt: skip
    with _slowed(_SLOW_BYTES_PER_S):
        return _crowd(quick, folder, 8 * args.repeats, num_prompt=400, num_new=20)


def robustness(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Kills and damage."""
    told = folder.with_suffix(".json")
    command = [sys.executable, _ROBUSTNESS, "--kills", str(args.kills), "--damages", str(args.damages), "--json", told]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(told.read_text())
    return found


class _Run:
    """One crowded run, to its end."""

    def __init__(self, model: Any, folder: Path | None, prompts: Sequence[Sequence[int]], num_new: int) -> None:
        num_blocks = 16 * (len(prompts[0]) + num_new - 10) // 8
        engine = _engine(model, folder, num_blocks=num_blocks, max_num_seqs=64)
        for prompt in prompts:
            _add(engine, prompt, num_new)
        began, began_cpu, num_tokens = time.perf_counter(), time.process_time(), 0
        while engine.has_work:
            num_tokens += sum(len(output.token_ids) for output in engine.step())
        self.tokens_per_s = num_tokens / (time.perf_counter() - began)
        self.cpu_s = (time.process_time() - began_cpu) / num_tokens
        assert engine.last_stats is not None
        self.preemptions = engine.last_stats.total_preemptions
        self.loaded = engine.last_stats.offloading.total_tokens_loaded
        engine.close(0.0)


def _crowd(model: Any, folder: Path, repeats: int, num_prompt: int = 100, num_new: int = 60) -> dict[str, Any]:
    prompts = [_tokens(model, num_prompt, seed=row) for row in range(64)]
    _Run(model, None, prompts, 2)  # kernels are loaded
    runs: dict[str, list[_Run]] = {"without": [], "with": []}
    for i in range(repeats):
        for side in sorted(runs, reverse=i % 2 == 0):
            runs[side].append(_Run(model, folder / str(i) if side == "with" else None, prompts, num_new))
    pairs = list(zip(runs["without"], runs["with"], strict=True))
    cpu = {side: statistics.median(run.cpu_s for run in each) for side, each in runs.items()}
    rates = {side: statistics.median(run.tokens_per_s for run in each) for side, each in runs.items()}
    return {
        "without_tokens_per_s": round(rates["without"], 1),
        "with_tokens_per_s": round(rates["with"], 1),
        "times_as_quick": round(statistics.median(b.tokens_per_s / a.tokens_per_s for a, b in pairs), 3),
        "without_cpu_ms_a_token": round(cpu["without"] * 1e3, 3),
        "with_cpu_ms_a_token": round(cpu["with"] * 1e3, 3),
        "times_as_quick_by_cpu": round(statistics.median(a.cpu_s / b.cpu_s for a, b in pairs), 3),
        "preemptions_a_run": statistics.mean(run.preemptions for run in runs["with"]),
        "tokens_loaded_a_run": statistics.mean(run.loaded for run in runs["with"]),
    }


@contextmanager
def _slowed(bytes_per_s: float) -> Iterator[None]:
    """Throttle the disk to this rate."""

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
    return [draw.randrange(model.config.vocab_size) for _ in range(num)]


if __name__ == "__main__":
    main()

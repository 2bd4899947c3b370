"""End to end on a GPU: LLaMA-shaped models with random bf16 weights, ours beside stock generate in static batches.

    python benchmarks/bench_gpu.py [--models 7b,13b] [--requests 512] [--static 64] [--json PATH]

512 requests with ShareGPT-like lengths (Kwon et al., 2023, figure 11: mean prompt 161 and mean output 338 tokens), all
at once, greedy, end-of-sequence ignored. Stock gets one batch, as large as its K/V fit at their longest, of every k-th
request, so that its lengths are those of all; or, with --static, one batch of each size, of which the best counts.

The lower bound of a decode step is the time in which the device copies as many bytes as the step must read: weights and
K/V.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_race import copy_bandwidth, device_name
from paged_bench.paged import Paged
from paged_bench.results import Run, summarise
from paged_bench.stock import HFStatic
from paged_bench.workloads import BenchRequest
from paged_core import EngineConfig, StepStats, hookimpl
from paged_hf.model.paged_model import HFPagedModel

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 512},
}  # fmt: skip
_MEAN_PROMPT, _MEAN_OUTPUT, _LONGEST = 161, 338, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="7b,13b", help=f"of {', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--static", help="sizes of stock's batches (default: one, as large as fits)")
    parser.add_argument("--longest", type=int, default=_LONGEST, help="tokens of a prompt or an output at most")
    parser.add_argument("--kv-bytes", type=int, help="memory for our K/V (default: 0.85 of what the weights leave)")
    parser.add_argument("--kv-cache-dtype", help="of our K/V (default: the model's)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bandwidth = copy_bandwidth(torch.device(options.device))
    print(f"{device_name(options.device)}, copies {bandwidth / 1e9:.0f} GB/s", flush=True)
    about = {
        "device": device_name(options.device),
        "copy_bytes_per_s": bandwidth,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
        "requests": options.requests,
    }
    results: dict[str, dict[str, Any]] = {}
    for name in options.models.split(","):
        for measured in measure(name, options, bandwidth):  # an interrupted run keeps its results
            results[name] = measured
            if options.json:
                options.json.write_text(json.dumps({**about, "models": results}, indent=1) + "\n")
        show(name, results[name])


def measure(name: str, options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Run ours over all requests, then each of stock's batches; yields the results so far after each."""
    began = time.perf_counter()
    model = random_model(SHAPES[name], options.longest, torch.device(options.device))
    print(f"{name}: made in {time.perf_counter() - began:.1f} s", flush=True)
    requests = sharegpt_like(options.requests, options.longest, model.config.vocab_size)
    run, result = _ours(model, requests, options, bandwidth)
    _forget()
    ours_per_s = result["paged_tokens_per_s"]
    print(f"{name}: ours {ours_per_s:.0f} tok/s, {run.duration_s:.1f} s", flush=True)
    yield result
    stock = HFStatic(model, 1)
    stock.run([BenchRequest(0, requests[0].prompt[:8], 8)], _nobody)  # its kernels are loaded
    sizes = map(int, options.static.split(",")) if options.static else [_largest_batch(model, options)]
    for size in sizes:
        result["static"][size] = _stock(stock, size, requests, run)
        speeds = [static["tokens_per_s"] for static in result["static"].values() if "tokens_per_s" in static]
        result["times"] = ours_per_s / max(speeds) if speeds else None
        yield result
    del stock, model
    _forget()


def _ours(
    model: Any, requests: Sequence[BenchRequest], options: argparse.Namespace, bandwidth: float
) -> tuple[Run, dict[str, Any]]:
    """All requests on our engine: the run, and what is told of it, with room for stock's."""
    steps = StepTimes()
    config = EngineConfig(
        kv_cache_bytes=options.kv_bytes or _room(model),
        kv_cache_dtype=options.kv_cache_dtype,
        max_num_seqs=min(256, options.requests),
        enable_prefix_caching=False,  # random prompts share nothing
    )
    began = time.perf_counter()
    run = Paged(HFPagedModel(model), config, plugins=(steps,)).run(requests, _nobody)
    ours = summarise("paged", [run], requests)
    return run, {
        "paged_tokens_per_s": ours.tokens_per_s,
        "paged_s": run.duration_s,
        "warm_up_s": time.perf_counter() - began - run.duration_s,
        "kv_waste": run.kv_waste,
        "ttft_p50_s": ours.ttft_p50_s,
        "itl_p50_s": ours.itl_p50_s,
        "itl_p99_s": ours.itl_p99_s,
        "decode": steps.against_floor(_num_bytes(model), bandwidth, model.config),
        "static": {},
        "times": None,
    }


def _stock(stock: HFStatic, size: int, requests: Sequence[BenchRequest], paged: Run) -> dict[str, Any]:
    batch = requests[:: max(1, len(requests) // size)][:size]
    stock.batch_size = len(batch)
    try:
        run = stock.run(batch, _nobody)
    except torch.OutOfMemoryError:
        return {"error": "does not fit"}
    finally:
        _forget()
    same = [_same(run.samples[r.index][0].token_ids, paged.samples[r.index][0].token_ids) / r.num_output for r in batch]
    return {
        "tokens_per_s": run.num_output_tokens / run.duration_s,
        "duration_s": run.duration_s,
        "identical": sum(share == 1 for share in same),
        "of": len(batch),
        "same_until": median(same),  # share of an output before the first difference
    }


def show(name: str, result: dict[str, Any]) -> None:
    decode = result["decode"]
    print(f"\n{name}: ours {result['paged_tokens_per_s']:.0f} tok/s, between tokens {1e3 * result['itl_p50_s']:.1f} ms")
    if decode:
        print(f"  a step of {decode['rows']} rows {1e3 * decode['step_s']:.2f} ms, "
              f"{decode['of_floor']:.0%} of its memory floor")  # fmt: skip
    for size, static in result["static"].items():
        if "error" in static:
            print(f"  stock, batch of {size}: {static['error']}")
        else:
            print(f"  stock, batch of {size}: {static['tokens_per_s']:.0f} tok/s; "
                  f"{static['identical']} of {static['of']} outputs the same")  # fmt: skip
    if result["times"]:
        print(f"  {result['times']:.1f}x stock's best batch", flush=True)


class StepTimes:
    """A plugin that records the duration of each decode step."""

    def __init__(self) -> None:
        self._ended: float | None = None
        self._decodes: list[tuple[float, int, int]] = []  # seconds, rows, slots in use

    @hookimpl
    def on_step_finished(self, stats: StepStats) -> None:
        now = time.perf_counter()
        if self._ended is not None and stats.num_tokens == stats.num_sampled:
            held = stats.num_blocks_used * stats.block_size - stats.num_slots_wasted
            self._decodes.append((now - self._ended, stats.num_sampled, held))
        self._ended = now

    def against_floor(self, weight_bytes: int, bandwidth: float, config: Any) -> dict[str, float] | None:
        """The median over steps of the largest batches; None without any."""
        most = max((rows for _, rows, _ in self._decodes), default=0)
        steps = [step for step in self._decodes if step[1] >= 0.9 * most]
        if not steps:
            return None
        floors = [(weight_bytes + held * _token_bytes(config)) / bandwidth for _, _, held in steps]
        return {
            "rows": most,
            "steps": len(steps),
            "step_s": median(seconds for seconds, _, _ in steps),
            "of_floor": median(floor / step[0] for floor, step in zip(floors, steps, strict=True)),
        }


def random_model(shape: dict[str, int], longest: int, device: torch.device) -> Any:
    """A Llama with random bf16 weights, made on the device."""
    config = LlamaConfig(**{"vocab_size": 32000, **shape}, max_position_embeddings=2 * longest)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def sharegpt_like(num: int, longest: int, vocab_size: int) -> list[BenchRequest]:
    """Log-normal lengths with ShareGPT's means, shuffled; prompts of random ids."""
    rng = random.Random(0)
    prompts, outputs = _lengths(num, _MEAN_PROMPT, longest), _lengths(num, _MEAN_OUTPUT, longest)
    rng.shuffle(prompts)
    rng.shuffle(outputs)
    return [
        BenchRequest(index, tuple(rng.randrange(vocab_size) for _ in range(prompt)), output)
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def _lengths(num: int, mean: int, longest: int) -> list[int]:
    """Quantiles of a log-normal (sigma 1) cut at ``longest``, scaled until the cut ones have this mean."""
    mean, shape = min(mean, longest // 2), [math.exp(NormalDist().inv_cdf((i + 0.5) / num)) for i in range(num)]
    scale = float(mean)
    for _ in range(20):
        lengths = [min(longest, max(4, round(scale * x))) for x in shape]
        scale *= mean * num / sum(lengths)
    return lengths


def _room(model: Any) -> int:
    """Bytes for K/V; the rest is for activations."""
    if model.device.type != "cuda":
        return 64 << 20
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(0.85 * free)


def _largest_batch(model: Any, options: argparse.Namespace) -> int:
    """Rows whose K/V fit when each has the longest prompt and the longest output; a multiple of 8 where it may."""
    rows = min(options.requests, _room(model) // (2 * options.longest * _token_bytes(model.config)))
    return max(1, rows // 8 * 8 or rows)


def _token_bytes(config: Any) -> int:
    """Bytes of a token's K and V in all layers, in bf16."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2)


def _num_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: all but the embedding table, of which it reads a row a token."""
    table = model.get_input_embeddings().weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not table)


def _same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nobody(num: int) -> None:
    """Ignores progress."""


if __name__ == "__main__":
    main()

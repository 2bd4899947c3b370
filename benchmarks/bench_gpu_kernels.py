"""The Triton kernels alone on a GPU: each compared with the device's copy speed and torch's best, in one run.

    python benchmarks/bench_gpu_kernels.py [--only decode,prefill,store,helpers,flex] [--json PATH]

Ours is captured in a CUDA graph, on layers that together are larger than the L2 cache. Torch's are not, because a
failing capture may spoil the next one; the device is kept busy until everything has been launched, so that launch times
don't count. All run in turn, and the median counts. Torch's get contiguous K/V, which a paged cache doesn't have.
Decode reads ``2 * sum(len) * K * D`` elements; its rate is compared with a copy of as many bytes, read and written
together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_attention_step import LLAMA_7B, LLAMA_8B, TINY, AttentionStep, Heads, RandomBlocks
from gpu_race import Work, copy_bandwidth, device_name, race, write
from paged_kernels import reference
from paged_kernels.layers import LayerCache
from paged_kernels.triton import elementwise, launch, sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {','.join(_PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="replays of each rival (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few tokens: to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device = torch.device(options.device)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(options.device)
    print(f"{device_name(options.device)}, copies {bandwidth / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for name in options.only.split(",") if options.only else _PARTS:
        print(f"\n{name}")
        for row in _PARTS[name](options, bandwidth):
            print("  " + "  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
            rows.append({"part": name, **row})
            if options.json:  # after each row: an interrupted run keeps its results
                write(options.json, options.device, bandwidth, rows)


def decode(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One token a row, over paged K/V."""
    cases: list[tuple[int, int, Heads, torch.dtype]] = [
        (64, 4096, LLAMA_8B, torch.bfloat16),
        (1, 32768, LLAMA_8B, torch.bfloat16),
        (8, 32768, LLAMA_8B, torch.bfloat16),
        (256, 512, LLAMA_8B, torch.bfloat16),
        (64, 1024, LLAMA_7B, torch.bfloat16),
        (64, 4096, LLAMA_8B, torch.int8),
        (64, 4096, LLAMA_8B, torch.float8_e4m3fn),
    ]
    if options.tiny:
        cases = [(2, 40, TINY, torch.bfloat16), (1, 70, TINY, torch.int8)]
    for rows, context, heads, cache_dtype in cases:
        step = AttentionStep(rows, context, 1, heads, cache_dtype, options.device)
        rivals = {"paged": step.paged()}
        if cache_dtype is torch.bfloat16:
            rivals["sdpa"] = step.sdpa()
        seconds = race(rivals, options.repeats, options.device, step.num_layers)
        yield {
            "rows": rows,
            "context": context,
            "heads": heads,
            "cache": str(cache_dtype)[6:],
            "us": 1e6 * seconds["paged"],
            "of copy": step.kv_bytes / seconds["paged"] / bandwidth,
            **{f"{name} us": 1e6 * taken for name, taken in seconds.items() if name != "paged"},
        }


def prefill(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Whole prompts, causal, and a chunk of a long one."""
    cases: list[tuple[int, int, int, Heads]] = [
        (8, 2048, 2048, LLAMA_8B),
        (8, 2048, 2048, LLAMA_7B),
        (32, 256, 256, LLAMA_8B),
        (1, 16384, 2048, LLAMA_8B),
    ]
    if options.tiny:
        cases = [(2, 40, 40, TINY), (1, 60, 20, TINY)]
    for rows, context, queries, heads in cases:
        step = AttentionStep(rows, context, queries, heads, torch.bfloat16, options.device)
        rivals = {"paged": step.paged()}
        if queries == context:
            rivals["sdpa"] = step.sdpa()
        seconds = race(rivals, options.repeats, options.device, step.num_layers)
        pairs = rows * sum(range(context - queries + 1, context + 1))  # pairs of a query and a visible key
        flop = 4 * pairs * heads[0] * heads[2]
        yield {
            "requests": rows,
            "context": context,
            "queries": queries,
            "heads": heads,
            **{f"{name} TFLOP/s": flop / taken / 1e12 for name, taken in seconds.items()},
            **({"of sdpa": seconds["sdpa"] / seconds["paged"]} if "sdpa" in seconds else {}),
        }


def store(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """K/V of 8,192 tokens into their blocks."""
    num_tokens, (_, num_kv_heads, dim) = (16, TINY) if options.tiny else (8192, LLAMA_8B)
    k, v = (torch.randn(num_tokens, num_kv_heads, dim, device=options.device).bfloat16() for _ in range(2))
    slots = torch.randperm(num_tokens, device=options.device) + 16
    for dtype in (torch.bfloat16, torch.int8):
        cache = RandomBlocks(num_tokens // 16 + 2, num_kv_heads, dim, dtype, options.device)

        def run(cache: RandomBlocks = cache) -> None:
            launch.store_kv(k, v, LayerCache(cache.keys, cache.values, *cache.scales), slots)

        seconds = race({"paged": run}, options.repeats, options.device)["paged"]
        moved = 2 * k.numel() * (2 + dtype.itemsize)
        yield {
            "tokens": num_tokens,
            "cache": str(dtype)[6:],
            "us": 1e6 * seconds,
            "of copy": moved / seconds / bandwidth,
        }


def helpers(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The fused helpers, each beside the plain torch code that it replaces."""
    for rows in (4,) if options.tiny else (64, 4096):
        width, vocab = (64, 512) if options.tiny else (4096, 128256)
        x, gate = (torch.randn(rows, width, device=options.device).bfloat16() for _ in range(2))
        weight = torch.ones(width, device=options.device).bfloat16()
        logits = torch.randn(min(rows, 256), vocab, device=options.device).bfloat16()
        for what, args in {
            "rms_norm": (x, weight, 1e-5),
            "silu_mul": (x, gate),
            "argmax_rows": (logits,),
        }.items():
            ours = sampling if what == "argmax_rows" else elementwise
            rivals = {"ours": _bound(ours, what, args), "torch": _bound(reference, what, args)}
            seconds = race(rivals, options.repeats, options.device)
            yield {"": what, "rows": len(args[0]), **{f"{name} us": 1e6 * taken for name, taken in seconds.items()}}


def flex(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Decode and prefill beside torch's flex_attention, which takes long to compile, so it comes last, with one case of
    each."""
    heads = TINY if options.tiny else LLAMA_8B
    for rows, context, queries in ((2, 40, 1), (2, 40, 40)) if options.tiny else ((64, 4096, 1), (8, 2048, 2048)):
        step = AttentionStep(rows, context, queries, heads, torch.bfloat16, options.device)
        rivals = {"paged": step.paged()}
        if options.device.type == "cuda":
            rivals["flex"] = step.flex()
        seconds = race(rivals, options.repeats, options.device, step.num_layers)
        taken = {f"{name} us": 1e6 * taken for name, taken in seconds.items()}
        yield {"rows": rows, "context": context, "queries": queries, "heads": heads, **taken}


_PARTS: dict[str, Callable[[argparse.Namespace, float], Iterator[dict[str, Any]]]] = {
    "decode": decode,
    "prefill": prefill,
    "store": store,
    "helpers": helpers,
    "flex": flex,
}


def _bound(module: Any, name: str, args: tuple[Any, ...]) -> Work:
    function = getattr(module, name)
    return lambda: function(*args)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

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
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from paged_kernels import reference
from paged_kernels.layers import Extras, LayerCache
from paged_kernels.triton import elementwise, launch, sampling

_L2_BYTES = 256 << 20  # well beyond any device's
Work = Callable[[], Any]
Heads = tuple[int, int, int]  # query heads, kv heads, head dim
_HEAD_START = 4_000_000  # cycles: about 2 ms, during which the host launches the timed work
_RIVALS = ("sdpa", "flex", "torch")  # torch's, which may fail
LLAMA_8B, LLAMA_7B, TINY = (32, 8, 128), (32, 32, 128), (4, 2, 64)


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


def write(path: Path, device: torch.device, bandwidth: float, rows: list[dict[str, Any]]) -> None:
    about = {
        "device": device_name(device),
        "copy_bytes_per_s": bandwidth,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
    }
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


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
        step = Step(rows, context, 1, heads, cache_dtype, options.device)
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
        step = Step(rows, context, queries, heads, torch.bfloat16, options.device)
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
        cache = Cache(num_tokens // 16 + 2, num_kv_heads, dim, dtype, options.device)

        def run(cache: Cache = cache) -> None:
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
        step = Step(rows, context, queries, heads, torch.bfloat16, options.device)
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


class Cache:
    """One layer's K/V in random blocks."""

    def __init__(self, num_blocks: int, num_kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_blocks, num_kv_heads, 16, dim)
        self.keys, self.values = (_filled(shape, dtype, device) for _ in range(2))
        quantised = dtype.itemsize == 1
        scales = [torch.rand(shape[:3], device=device) * 0.01 for _ in range(2)] if quantised else [None, None]
        self.scales: tuple[Tensor | None, Tensor | None] = (scales[0], scales[1])


class Step:
    """The attention of one step, over as many layers as it takes to leave the L2 cache."""

    def __init__(
        self, rows: int, context: int, queries: int, heads: Heads, dtype: torch.dtype, device: torch.device
    ) -> None:
        num_heads, num_kv_heads, dim = heads
        self.shape = rows, context, queries, heads
        self.dtype, self.device = dtype, device
        self.kv_bytes = 2 * rows * context * num_kv_heads * dim * dtype.itemsize
        self.num_layers = max(1, min(8, -(-_L2_BYTES // self.kv_bytes))) if device.type == "cuda" else 1
        blocks = -(-context // 16)
        self.layers = [Cache(rows * blocks + 1, num_kv_heads, dim, dtype, device) for _ in range(self.num_layers)]
        order = torch.randperm(rows * blocks) + 1
        self.tables = order.view(rows, blocks).to(device, torch.int32)
        self.q = torch.randn(rows * queries, num_heads, dim, device=device).bfloat16()
        self.k, self.v = (torch.randn(rows * queries, num_kv_heads, dim, device=device).bfloat16() for _ in range(2))

    def paged(self) -> Work:
        """Run all layers. Decode stores its token too; torch's have all K/V already, and so has a prompt here."""
        rows, context, queries, (num_heads, num_kv_heads, dim) = self.shape
        starts = torch.arange(0, rows * queries + 1, queries, dtype=torch.int32, device=self.device)
        lens = torch.full((rows,), context, dtype=torch.int32, device=self.device)
        positions = torch.arange(context - queries, context, device=self.device).repeat(rows)
        owners = torch.arange(rows, device=self.device).repeat_interleave(queries)
        slots = self.tables[owners, positions // 16].long() * 16 + positions % 16
        plan = launch.AttentionPlan(num_heads, num_kv_heads, dim, dim, None, torch.bfloat16, self.dtype)
        plan.plan(starts, lens, self.tables, slots, queries, context)
        k, v = (self.k, self.v) if queries == 1 else (None, None)

        def run() -> None:
            for layer in self.layers:
                cache = LayerCache(layer.keys, layer.values, *layer.scales)
                plan.run(self.q, k, v, cache, Extras(dim**-0.5))

        return run

    def sdpa(self) -> Work:
        """Torch's SDPA over contiguous K/V."""
        q, layers = self._contiguous()
        causal = self.shape[2] > 1

        def run() -> None:
            for k, v in layers:
                functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return run

    def flex(self) -> Work:
        """Torch's compiled flex_attention over contiguous K/V."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _, context, queries, _ = self.shape
        torch._dynamo.reset()  # it compiles a function for a few shapes only
        compiled = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(_causal, None, None, queries, context, device=self.device) if queries > 1 else None
        q, layers = self._contiguous()

        def run() -> None:
            for k, v in layers:
                compiled(q, k, v, block_mask=mask, enable_gqa=True)

        return run

    def _contiguous(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """q [R,H,n,D], and each layer's K and V [R,K,context,D]."""
        rows, context, queries, (num_heads, num_kv_heads, dim) = self.shape
        q = self.q.view(rows, queries, num_heads, dim).transpose(1, 2)
        return q, [_contiguous(rows, num_kv_heads, context, dim, self.device) for _ in self.layers]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy much larger than the caches."""
    num_bytes = (4 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / race({"copy": lambda: target.copy_(source)}, 10, device)["copy"]


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} (not a GPU)"


def race(rivals: dict[str, Work], repeats: int, device: torch.device, per: int = 1) -> dict[str, float]:
    """Median seconds of each, divided by ``per``. One of torch's that fails is left out, with a message."""
    ready: dict[str, Work] = {}
    for name, run in rivals.items():
        if name not in _RIVALS:
            ready[name] = _captured(run) if device.type == "cuda" else run
            continue
        try:
            for _ in range(3):
                run()
            ready[name] = run
        except Exception as error:
            print(f"  ({name} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__})")
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, run in ready.items():
            times[name].append(_timed(run, device))
    return {name: median(found) / per for name, found in times.items()}


def _captured(run: Work) -> Work:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def _timed(run: Work, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _contiguous(rows: int, num_kv_heads: int, context: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(rows, num_kv_heads, context, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    return k, v


def _filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values that are not NaN in 8 bits either."""
    if dtype.itemsize == 1:
        return torch.randint(-100, 100, tuple(shape), dtype=torch.int8, device=device).to(dtype)
    return torch.randn(tuple(shape), device=device, dtype=dtype)


def _bound(module: Any, name: str, args: tuple[Any, ...]) -> Work:
    function = getattr(module, name)
    return lambda: function(*args)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

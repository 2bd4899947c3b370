"""The CPU kernels alone: decode compared with the machine's read speed and with SDPA, chunks with SDPA, helpers with
torch. Seeded; all are timed in turn and the best time of each counts, so that noise affects all alike. Shared: requests
that begin with the same blocks, with the blocks read once and read by each request.

Decode uses more layers than fit the caches, as a model does, so its keys come from memory; then as many layers of int8
codes and scales, which have a quarter or half of the bytes. SDPA gets contiguous K/V (which a paged cache doesn't
have), and with ``gather`` K/V that it must first collect from the blocks.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paged_kernels import reference
from paged_kernels.cpu import elementwise, launch
from paged_kernels.layers import Extras, LayerCache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMOLLM2, LLAMA_8B = (9, 3, 64), (32, 8, 128)  # query heads, kv heads, head dim
STREAM_BYTES = 400 << 20  # more than the caches hold
Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of queries and caches")
    parser.add_argument("--repeats", type=int, default=7, help="times each rival runs; the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", choices=["memory", "decode", "shared", "chunks", "launch", "helpers"], help="one part"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    launch.warm_up()
    launch.warm_up(cache_dtype=torch.int8)
    elementwise.warm_up()
    rows: list[dict[str, Any]] = []
    parts = {
        "memory": memory,
        "decode": decode,
        "shared": shared,
        "chunks": chunks,
        "launch": launches,
        "helpers": helpers,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            print(f"\n{name}")
            for row in part(options):
                print("  " + "  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
                rows.append({"part": name, **row})
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "threads": options.threads}
        options.json.write_text(json.dumps({**machine, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


def memory(options: argparse.Namespace) -> Any:
    big = torch.randn(STREAM_BYTES // 4)
    small, other = big[: 1 << 20], torch.empty_like(big)
    best = race({"read": big.sum, "copy": lambda: other.copy_(big), "cache": small.sum}, options.repeats)
    yield {"read GB/s": _gb(big, best["read"]), "copy GB/s": 2 * _gb(big, best["copy"]),
           "read 4 MiB GB/s": _gb(small, best["cache"])}  # fmt: skip


def decode(options: argparse.Namespace) -> Any:
    shapes = [(64, 170, SMOLLM2), (1, 4096, SMOLLM2)]
    if not options.quick:
        shapes += [(64, 1024, SMOLLM2), (1, 32768, SMOLLM2), (64, 170, LLAMA_8B), (1, 4096, LLAMA_8B)]
    for dtype in options.dtype:
        for num_rows, context, heads in shapes:
            for block_size in (8, 16, 32) if (num_rows, context) == (64, 170) else (16,):
                yield from _decode(num_rows, context, heads, block_size, DTYPES[dtype], options)


def _decode(num_rows: int, context: int, heads: tuple[int, int, int], block_size: int, dtype: torch.dtype,
            options: argparse.Namespace) -> Any:  # fmt: skip
    step = Step(num_rows, context, 1, heads, block_size, dtype)
    num_bytes = sum(t.numel() * t.element_size() for t in step.layers[0])
    rivals: dict[str, Work] = {"paged": step.run_all, "paged int8": step.codes_all(), "gather + sdpa": step.gather_all,
                              "sdpa": step.sdpa_all()}  # fmt: skip
    best = race(rivals, options.repeats)
    per_layer = {name: seconds / len(step.layers) for name, seconds in best.items()}
    yield {
        "dtype": str(dtype)[6:],
        "rows": num_rows,
        "context": context,
        "heads": heads,
        "block": block_size,
        "GB/s": num_bytes / per_layer["paged"] / 1e9,
        **{f"{name} us": 1e6 * seconds for name, seconds in per_layer.items()},
    }


def shared(options: argparse.Namespace) -> Any:
    """64 requests with 512 tokens in common and some of their own: read once, and by each request by itself."""
    for name in options.dtype:
        step = Step(64, 576, 1, SMOLLM2, 8, DTYPES[name], stream=False, shared=512)
        alone = launch.AttentionPlan(*SMOLLM2[:2], SMOLLM2[2], SMOLLM2[2])
        together = step.plan
        for plan in (alone, together):
            plan.plan(*step.metadata)
        rivals: dict[str, Work] = {}
        for kind, run in {"": step.run_all, " int8": step.codes_all()}.items():
            rivals |= {f"alone{kind}": _with(step, alone, run), f"together{kind}": _with(step, together, run)}
        best = race(rivals, options.repeats * 5)
        yield {"dtype": name, **{f"{what} us": 1e6 * seconds for what, seconds in best.items()}}


def _with(step: Step, plan: launch.AttentionPlan, run: Work) -> Work:
    def work() -> None:
        step.plan = plan
        run()

    return work


def chunks(options: argparse.Namespace) -> Any:
    shapes = [(8, 256, 256, SMOLLM2), (1, 4096, 512, SMOLLM2), (16, 64, 64, SMOLLM2)]
    if not options.quick:
        shapes += [(1, 4096, 512, LLAMA_8B)]
    for dtype in options.dtype:
        for num_rows, context, queries, heads in shapes:
            step = Step(num_rows, context, queries, heads, 16, DTYPES[dtype], stream=False)
            best = race({"paged": step.run_all, "sdpa": step.sdpa_all()}, options.repeats)
            seen = sum(range(context - queries + 1, context + 1)) * num_rows  # (query, key) pairs that are not masked
            flop = 4 * seen * heads[0] * heads[2]
            yield {"dtype": dtype, "requests": num_rows, "context": context, "queries": queries, "heads": heads,
                   "GFLOP/s": flop / best["paged"] / 1e9, "sdpa GFLOP/s": flop / best["sdpa"] / 1e9}  # fmt: skip


def launches(options: argparse.Namespace) -> Any:
    step = Step(1, 1, 1, SMOLLM2, 16, torch.float32, stream=False)
    longer = Step(1, 100, 1, SMOLLM2, 16, torch.float32, stream=False)
    many = Step(64, 170, 1, SMOLLM2, 16, torch.float32, stream=False)
    step.run_all()  # after which no work is left, so that only the launch itself is timed
    rivals: dict[str, Work] = {
        "one kernel launch": lambda: launch.kernels.store_and_attend(step.plan._address, options.threads),
        "a layer, one row, context 1": step.run_all,
        "a layer, one row, context 100": longer.run_all,
        "plan, one row": lambda: step.plan.plan(*step.metadata),
        "plan, 64 rows": lambda: many.plan.plan(*many.metadata),
    }
    for name, seconds in race(rivals, options.repeats * 200).items():
        yield {"us": 1e6 * seconds, "": name}


def helpers(options: argparse.Namespace) -> Any:
    for name in options.dtype:
        dtype = DTYPES[name]
        x, weight = torch.randn(64, 576).to(dtype), torch.ones(576, dtype=dtype)
        q, k = torch.randn(64, 9, 64).to(dtype), torch.randn(64, 3, 64).to(dtype)
        cos, sin = torch.zeros(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
        logits = torch.randn(64, 49152).to(dtype)
        for what, args in {
            "rms_norm": (x, weight, 1e-5),
            "rotary": (q, k, cos, sin),
            "argmax_rows": (logits,),
        }.items():
            rivals = {"ours": _bound(elementwise, what, args), "torch": _bound(reference, what, args)}
            best = race(rivals, options.repeats * 20)
            yield {"dtype": name, "": what, "us": 1e6 * best["ours"], "torch us": 1e6 * best["torch"]}


class Step:
    """One step of some requests, over as many layers as it takes to leave the caches."""

    def __init__(self, num_rows: int, context: int, queries: int, heads: tuple[int, int, int], block_size: int,
                 dtype: torch.dtype, stream: bool = True, shared: int = 0) -> None:  # fmt: skip
        num_heads, num_kv_heads, dim = heads
        blocks = -(-context // block_size)
        shape = (num_rows * blocks + 1, num_kv_heads, block_size, dim)
        layer_bytes = 2 * dtype.itemsize * num_rows * blocks * num_kv_heads * block_size * dim
        num_layers = max(2, min(30, STREAM_BYTES // layer_bytes)) if stream else 1
        self.layers = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(num_layers)]
        self.q = torch.randn(num_rows * queries, num_heads, dim).to(dtype)
        self.k = torch.randn(num_rows * queries, num_kv_heads, dim).to(dtype)
        self.scale, self.context, self.num_rows = dim**-0.5, context, num_rows
        self.tables = (torch.randperm(num_rows * blocks).int() + 1).view(num_rows, blocks)
        self.tables[:, : shared // block_size] = self.tables[0, : shared // block_size]
        at = torch.arange(context - queries, context)
        slots = self.tables.long()[:, at // block_size] * block_size + at % block_size
        starts = torch.arange(num_rows + 1, dtype=torch.int32) * queries
        lens = torch.full((num_rows,), context, dtype=torch.int32)
        self.metadata = (starts, lens, self.tables, slots.flatten())
        self.plan = launch.AttentionPlan(num_heads, num_kv_heads, dim, dim, None, block_size)
        self.plan.plan(*self.metadata)
        hidden = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
        self.mask = hidden if queries > 1 else None

    def run_all(self) -> None:
        for keys, values in self.layers:
            self.plan.run(self.q, self.k, self.k, LayerCache(keys, values), Extras(self.scale))

    def codes_all(self) -> Work:
        shape = self.layers[0][0].shape
        layers = [
            [*(torch.randint(-127, 128, shape, dtype=torch.int8) for _ in "kv"), *(torch.rand(shape[:3]) for _ in "kv")]
            for _ in self.layers
        ]

        def run() -> None:
            for layer in layers:
                self.plan.run(self.q, self.k, self.k, LayerCache(*layer), Extras(self.scale))

        return run

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``[blocks,K,bs,D] -> [R,K,context,D]``, copied."""
        k, v = (c[self.tables.long()].transpose(1, 2).flatten(2, 3)[:, :, : self.context] for c in (keys, values))
        return k, v

    def attend(self, k: Tensor, v: Tensor) -> None:
        q = self.q.view(self.num_rows, -1, *self.q.shape[1:]).transpose(1, 2)
        functional.scaled_dot_product_attention(q, k, v, self.mask, scale=self.scale, enable_gqa=True)

    def gather_all(self) -> None:
        for layer in self.layers:
            self.attend(*self.gather(*layer))

    def sdpa_all(self) -> Work:
        contiguous = [tuple(t.contiguous() for t in self.gather(*layer)) for layer in self.layers]

        def run() -> None:
            for k, v in contiguous:
                self.attend(k, v)

        return run


def race(rivals: dict[str, Work], repeats: int) -> dict[str, float]:
    """The best time of each, in seconds; they run in turn."""
    best = dict.fromkeys(rivals, float("inf"))
    for _ in range(repeats + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _bound(module: Any, name: str, args: tuple[Any, ...]) -> Work:
    return lambda: getattr(module, name)(*args)


def _gb(x: Tensor, seconds: float) -> float:
    return x.numel() * x.element_size() / seconds / 1e9


def _shown(value: Any) -> str:
    return f"{value:8.1f}" if isinstance(value, float) else f"{value!s:>4}"


if __name__ == "__main__":
    main()

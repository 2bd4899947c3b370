"""Linear layers of a decode step: torch's own against packed products, and whole steps without attention.

Weights are read from memory as in a real step: each shape has as many copies as fill --megabytes, used in turn. Stock
and ours are interleaved; the least of --repeats counts, because whatever else runs can only add.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paged_kernels.cpu.linear import PackedLinear
from torch import Tensor
from torch.nn.functional import linear, silu

# SmolLM2-135M: (name, output columns of each layer, input columns, gated)
SHAPES = [
    ("q,k,v", (576, 192, 192), 576, False),
    ("o", (576,), 576, False),
    ("gate,up", (1536, 1536), 576, True),
    ("down", (576,), 1536, False),
    ("lm_head", (49152,), 576, False),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = 30


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = [int(n) for n in args.rows.split(",")]
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in args.dtypes.split(","):
            for result in (*products(DTYPES[name], rows, args), *steps(DTYPES[name], rows, args)):
                results.append({"dtype": name, **result})
                print_line(results[-1])
    if args.json:
        about = {"machine": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,4,8,16,32,64,256", help="rows of x, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=64, help="weights of one shape, at least one copy")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--no-steps", action="store_true", help="leave out the whole steps (they need transformers)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there too")
    return parser.parse_args()


def products(dtype: torch.dtype, rows: list[int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, sizes, depth, gated in SHAPES:
        size = sum(sizes) * depth * dtype.itemsize
        copies = max(1, args.megabytes * 2**20 // size)
        weights = [[torch.randn(n, depth).mul_(0.02).to(dtype) for n in sizes] for _ in range(copies)]
        packed = [PackedLinear(ws, [None] * len(ws), gated) for ws in weights]
        calls = stock_calls(weights, gated), packed_calls(packed)
        for num_rows in rows:
            x = torch.randn(num_rows, depth).to(dtype)
            stock_s, ours_s = fastest(*(partial(call, x) for call in calls), repeats=args.repeats)
            yield {
                "what": name,
                "rows": num_rows,
                "stock_us": stock_s / copies * 1e6,
                "ours_us": ours_s / copies * 1e6,
                "ours_gflops": 2 * num_rows * sum(sizes) * depth * copies / ours_s / 1e9,
            }


def stock_calls(copies: list[list[Tensor]], gated: bool) -> Callable[[Tensor], None]:
    def call(x: Tensor) -> None:
        for weights in copies:
            parts = [linear(x, weight) for weight in weights]
            if gated:
                silu(parts[0]).mul_(parts[1])

    return call


def packed_calls(copies: list[PackedLinear]) -> Callable[[Tensor], None]:
    def call(x: Tensor) -> None:
        for product in copies:
            product(x)

    return call


def steps(dtype: torch.dtype, rows: list[int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A whole step of a Llama of these shapes, random weights, attention left out (its query comes back)."""
    if args.no_steps:
        return
    from paged_hf.model.paged_model import HFPagedModel
    from transformers import LlamaConfig, LlamaForCausalLM

    from paged_core.builtin.forwards import create_module_forward

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    plain, fast = HFPagedModel(model), HFPagedModel(model)
    start = time.perf_counter()
    fast.accelerate(lambda module: create_module_forward(module, torch.device("cpu")))
    print(f"{'':>8}  taking in the model: {time.perf_counter() - start:.1f} s")

    def step(paged: HFPagedModel, num_rows: int) -> Tensor:
        ids, sampled = torch.arange(num_rows), torch.arange(min(num_rows, 64))
        return paged.forward(ids, ids, lambda layer, q, k, v, sinks=None: q, sampled)

    for num_rows in rows:
        stock_s, ours_s = fastest(partial(step, plain, num_rows), partial(step, fast, num_rows), repeats=args.repeats)
        yield {"what": "step", "rows": num_rows, "stock_us": stock_s * 1e6, "ours_us": ours_s * 1e6}


def fastest(*calls: Callable[[], Any], repeats: int) -> list[float]:
    best = [float("inf")] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:  # the first is for warming up
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def print_line(r: dict[str, Any]) -> None:
    gflops = f"{r['ours_gflops']:6.0f} GFLOP/s" if "ours_gflops" in r else ""
    print(
        f"{r['dtype']:>8} {r['what']:>8} {r['rows']:4d} rows  stock {r['stock_us']:9.0f} us  "
        f"ours {r['ours_us']:9.0f} us  {r['stock_us'] / r['ours_us']:5.2f}x  {gflops}",
        flush=True,
    )


if __name__ == "__main__":
    main()

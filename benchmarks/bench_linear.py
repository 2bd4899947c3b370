"""Linear layers of a decode step: torch's own and oneDNN prepacked against packed products, and whole steps without
attention; weights of int8 and int4, by each path, and oneDNN's int8, prepacked, beside them.

Weights are read from memory as in a real step: each shape has as many copies as fill --megabytes, used in turn. All are
interleaved, and the least of --repeats counts, because other processes can only add time. With one thread its CPU time
is taken, so that a busy machine disturbs less. Shares relate to the peak rate of a path's instruction (peaks.py); for
oneDNN, to the host's best instruction for the dtype.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import llvmlite
import numba
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import peaks
from paged_bench.report import cpu_name
from paged_kernels.cpu import fma, host
from paged_kernels.cpu.integer_product import IntegerProduct
from paged_kernels.cpu.integers import quantize
from paged_kernels.cpu.linear import Packed, PackedLinear
from paged_kernels.cpu.product import Product
from paged_kernels.cpu.quantized import QuantizedLinear

# SmolLM2-135M: (name, output columns of each layer, input columns, gated)
SHAPES = [
    ("q,k,v", (576, 192, 192), 576, False),
    ("o", (576,), 576, False),
    ("gate,up", (1536, 1536), 576, True),
    ("down", (576,), 1536, False),
    ("lm_head", (49152,), 576, False),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = {torch.float32: (fma.FLOAT32,), torch.bfloat16: host.BF16}
FEATURES = ("avx2", "fma", "avx512f", "avx512bf16", "avx512vnni", "amx-tile", "amx-bf16", "amx-int8")
LAYERS = 30
LARGE = "large", (1024,), 1024, False  # by 1,024 rows

Shape = tuple[str, tuple[int, ...], int, bool]

ONEDNN = "oneDNN int8"
PEAKS: dict[str, float] = {}  # GFLOP/s of all threads, by path
Calls = dict[str, Callable[[Tensor], Any]]


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = [int(n) for n in args.rows.split(",")]
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in filter(None, args.dtypes.split(",")):
            dtype = DTYPES[name]
            ways = [product for product in PRODUCTS[dtype] if wanted(product, dtype, args.paths)]
            most = {way.name: peak_of(way) for way in ways}
            most |= dict.fromkeys(("stock", "prepacked"), best_peak(PRODUCTS[dtype]))
            print(f"{name}: GFLOP/s at most: {peaks_line(most)}", flush=True)
            for result in chain(products(dtype, ways, rows, args), steps(dtype, rows, args)):
                results.append({"dtype": name, **result})
                print_line(results[-1], most)
        for kind in filter(None, args.weights.split(",")):
            by = [p for p in host.INTEGERS if wanted_by_name(p, args.paths)] or [None]
            most = {p.name: peak_of(p) for p in by if p is not None}
            most |= dict.fromkeys(("chosen", ONEDNN), best_peak(host.INTEGERS))
            print(f"{kind}: GFLOP/s at most: {peaks_line(most)}", flush=True)
            for result in integer_products(kind, by, rows, args):
                results.append({"dtype": kind, **result})
                print_line(results[-1], most)
    if args.json:
        found = {**about(), "peak_gflops": PEAKS, "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,4,8,16,32,64,256", help="rows of x, by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--paths",
        default="chosen",
        help="how ours compute: 'chosen' by the host, 'all' that it can run, or names by commas: "
        + ", ".join(product.name for product in host.BF16),
    )
    parser.add_argument("--weights", default="int8,int4", help="kinds of integers, by commas; empty: none")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=64, help="weights of one shape, at least one copy")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--no-steps", action="store_true", help="leave out the whole steps (they need transformers)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there too")
    return parser.parse_args()


def about() -> dict[str, Any]:
    """The hardware and versions of the results."""
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "target": llvmlite.binding.get_host_cpu_name(),
        "instructions": [feature for feature in FEATURES if host.has(feature)],
        "chosen": {name: host.choose(dtype).name for name, dtype in DTYPES.items()},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "llvmlite": llvmlite.__version__,
        },
    }


def peak_of(product: Product | IntegerProduct) -> float:
    if product.name not in PEAKS:
        PEAKS[product.name] = peaks.measure(product) * torch.get_num_threads()
    return PEAKS[product.name]


def best_peak(ways: Sequence[Product | IntegerProduct]) -> float:
    return max(peak_of(way) for way in ways if host.can_run(way))


def peaks_line(most: dict[str, float]) -> str:
    return ", ".join(f"{name} {gflops:.0f}" for name, gflops in most.items())


def shapes(rows: list[int]) -> Iterator[tuple[Shape, list[int]]]:
    """Each shape with its numbers of rows."""
    yield from ((shape, rows) for shape in SHAPES)
    yield LARGE, [1024]


def wanted(product: Product, dtype: torch.dtype, paths: str) -> bool:
    if paths == "chosen":
        return product is host.choose(dtype)
    return host.can_run(product) and (paths == "all" or product.name in paths.split(","))


def products(
    dtype: torch.dtype, ways: list[Product], rows: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for (name, sizes, depth, gated), numbers in shapes(rows):
        size = sum(sizes) * depth * dtype.itemsize
        copies = max(1, args.megabytes * 2**20 // size)
        weights = [[torch.randn(n, depth).mul_(0.02).to(dtype) for n in sizes] for _ in range(copies)]
        ours = {way.name: [PackedLinear(ws, [None] * len(ws), gated, way) for ws in weights] for way in ways}
        for num_rows in numbers:
            calls = {"stock": torch_calls(weights, gated, linear), **prepacked(weights, gated, num_rows)}
            calls |= {name: partial(call_all, packed) for name, packed in ours.items()}
            us = timed(calls, torch.randn(num_rows, depth).to(dtype), args)
            us = {who: each / copies for who, each in us.items()}
            flop = 2 * num_rows * sum(sizes) * depth
            gflops = {who: flop / each / 1e3 for who, each in us.items()}
            yield {"what": name, "rows": num_rows, "us": us, "gflops": gflops}


def wanted_by_name(product: IntegerProduct, paths: str) -> bool:
    return host.can_run(product) and (paths == "all" or product.name in paths.split(","))


def integer_products(
    kind: str, by: list[IntegerProduct | None], rows: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of bfloat16 by weights of integers; oneDNN's takes float32."""
    for (name, sizes, depth, gated), numbers in shapes(rows):
        copies = max(1, args.megabytes * 2**20 // (sum(sizes) * depth))
        weights = [[torch.randn(n, depth).mul_(0.02) for n in sizes] for _ in range(copies)]
        integers = [[quantize(weight, kind) for weight in ws] for ws in weights]
        ours = {}
        for product in by:
            packed = [QuantizedLinear(ws, [None] * len(ws), gated, product) for ws in integers]
            ours[product.name if product else "chosen"] = packed
        onednn = onednn_int8(weights, gated) if kind == "int8" else {}
        for num_rows in numbers:
            x = torch.randn(num_rows, depth)
            calls: Calls = {who: partial(call_all, packed) for who, packed in ours.items()}
            us = timed(calls, x.bfloat16(), args) | timed(onednn, x, args)
            us = {who: each / copies for who, each in us.items()}
            flop = 2 * num_rows * sum(sizes) * depth
            gflops = {who: flop / each / 1e3 for who, each in us.items()}
            yield {"what": name, "rows": num_rows, "us": us, "gflops": gflops}


def onednn_int8(copies: list[list[Tensor]], gated: bool) -> Calls:
    """oneDNN's product of prepacked int8 weights, with one scale per row, and rows quantised on the fly with a common
    scale; None if this torch lacks it."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        return {}
    torch.backends.quantized.engine = "onednn"
    packed = []
    for weights in copies:
        scales = [weight.abs().amax(1) / 127 for weight in weights]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that such tensors will be removed
            codes = [
                torch.quantize_per_channel(weight, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)
                for weight, scale in zip(weights, scales, strict=True)
            ]
        packed.append([torch.ops.quantized.linear_prepack(each, None) for each in codes])
    return {ONEDNN: torch_calls(packed, gated, torch.ops.quantized.linear_dynamic)}


def torch_calls(copies: list[list[Any]], gated: bool, product: Callable[[Tensor, Any], Tensor]) -> Any:
    def call(x: Tensor) -> None:
        for weights in copies:
            parts = [product(x, weight) for weight in weights]
            if gated:
                silu(parts[0]).mul_(parts[1])

    return call


def prepacked(copies: list[list[Tensor]], gated: bool, num_rows: int) -> Calls:
    """oneDNN over weights laid out for this number of rows; None if this torch lacks it."""
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    run = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if not torch.backends.mkldnn.is_available() or pack is None or run is None:
        return {}
    packed = [[pack(weight, num_rows) for weight in weights] for weights in copies]
    return {"prepacked": torch_calls(packed, gated, lambda x, weight: run(x, weight, None, "none", [], ""))}


def call_all(copies: Sequence[Packed], x: Tensor) -> None:
    for product in copies:
        product(x)


def steps(dtype: torch.dtype, rows: list[int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A whole step of a Llama of these shapes, random weights, attention left out (its query comes back)."""
    if args.no_steps:
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    from paged_core.builtin.forwards import create_module_forward
    from paged_hf.model.paged_model import HFPagedModel

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    plain, fast = HFPagedModel(model), HFPagedModel(model)
    start = time.perf_counter()
    fast.accelerate(lambda module: create_module_forward(module, torch.device("cpu")))
    print(f"{'':>8}  taking in the model: {time.perf_counter() - start:.1f} s")

    def step(paged: HFPagedModel, ids: Tensor) -> Tensor:
        return paged.forward(ids, ids, lambda layer, q, k, v, sinks=None: q, ids[:64])

    for num_rows in rows:
        calls: Calls = {"stock": partial(step, plain), host.choose(dtype).name: partial(step, fast)}
        yield {"what": "step", "rows": num_rows, "us": timed(calls, torch.arange(num_rows), args)}


def timed(calls: Calls, x: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds of each, the least of all repeats."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(args.repeats + 1):
        for name, call in calls.items():
            start = clock()
            call(x)
            if turn:  # the first is for warming up
                best[name] = min(best[name], clock() - start)
    return {name: seconds * 1e6 for name, seconds in best.items()}


def print_line(r: dict[str, Any], most: dict[str, float]) -> None:
    columns = []
    for name, us in r["us"].items():
        gflops = r.get("gflops", {}).get(name)
        rate = "" if gflops is None else f" {gflops:5.0f} GFLOP/s {gflops / most[name]:4.0%}"
        columns.append(f"{name} {us:8.0f} us{rate}")
    print(f"{r['dtype']:>8} {r['what']:>8} {r['rows']:4d} rows  " + "  ".join(columns), flush=True)


if __name__ == "__main__":
    main()

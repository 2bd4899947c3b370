"""Compiles every kernel for GPUs that need not be present, and checks registers, shared memory and spills against
limits.

    python -m paged_kernels.triton.compile --target sm_80,sm_90,gfx942

The modules of this package list their kernels and sizes (``variants``). No kernel is run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import paged_kernels.triton
from paged_kernels.triton.variants import FUSION, Variant

_SPILLS_FROM = 129  # head dims from here on may spill
_MAX_SPILL_BYTES = 16  # allowed for smaller ones: Triton before 3.7 spills four registers in one variant


class Card(NamedTuple):
    """What a program may use on a card."""

    target: GPUTarget
    tiles: str  # the card's name in ``tiles``
    max_registers: int  # per thread
    max_shared_bytes: int  # per program


CARDS = {
    "sm_80": Card(GPUTarget("cuda", 80, 32), "sm_80", 255, 163 << 10),
    "sm_90": Card(GPUTarget("cuda", 90, 32), "sm_90", 255, 227 << 10),
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), "hip", 512, 64 << 10),  # half of the registers are for products
}


@dataclass(frozen=True)
class Compiled:
    """One variant, compiled for one target."""

    kernel: str
    variant: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int  # local memory per thread; the kernels use none of their own
    seconds: float
    complaints: tuple[str, ...]


class Job(NamedTuple):
    """A variant by its index, because kernels can't be pickled."""

    module: str
    every: bool
    place: int
    target: str


# ---- what is compiled ------------------------------------------------------------------------------------------


def jobs(targets: Sequence[str], every: bool = False) -> list[Job]:
    """Return all variants of all modules of this package, for each target."""
    names = [info.name for info in pkgutil.iter_modules(paged_kernels.triton.__path__, "paged_kernels.triton.")]
    return [
        Job(name, every, index, target)
        for name in names
        if name != __name__ and not name.endswith(".compile")
        for target in targets
        for index in range(len(variants_of(name, target, every)))
    ]


def variants_of(module: str, target: str, every: bool) -> list[Variant]:
    """Return the variants that a module's launchers compile on a card; with ``every``, also those that they may
    compile."""
    found, card = importlib.import_module(module), CARDS[target].tiles
    sources = ("variants", "more_variants") if every else ("variants",)
    named = [variant for name in sources if hasattr(found, name) for variant in getattr(found, name)(card)]
    return list({(_name(variant), label(variant)): variant for variant in named}.values())


# ---- compiling -------------------------------------------------------------------------------------------------


def run(job: Job) -> Compiled:
    """Compile one variant, or load it from Triton's cache. A variant that does not compile is reported like one over a
    limit."""
    variant = variants_of(job.module, job.target, job.every)[job.place]
    try:
        return compile_variant(variant, job.target)
    except Exception as error:
        why = f"it doesn't compile: {str(error).strip()}"
        return Compiled(_name(variant), label(variant), job.target, 0, 0, 0, 0.0, (why,))


def compile_variant(variant: Variant, target: str) -> Compiled:
    started, card = time.perf_counter(), CARDS[target]
    built = triton.compile(_source(variant), target=card.target, options={**FUSION, **variant.options})
    registers, spill_bytes = _amd_usage(built.asm["amdgcn"]) if "amdgcn" in built.asm else _usage(built.asm["cubin"])
    shared_bytes: int = built.metadata.shared
    complaints = []
    if registers > card.max_registers:
        complaints.append(f"{registers} registers, {card.max_registers} are allowed")
    if shared_bytes > card.max_shared_bytes:
        complaints.append(f"{shared_bytes} bytes of shared memory, {card.max_shared_bytes} are allowed")
    if spill_bytes > _MAX_SPILL_BYTES and _head_dim(variant) < _SPILLS_FROM:
        complaints.append(f"{spill_bytes} bytes a thread are spilled")
    seconds = round(time.perf_counter() - started, 2)
    return Compiled(
        _name(variant), label(variant), target, registers, shared_bytes, spill_bytes, seconds, tuple(complaints)
    )


def _source(variant: Variant) -> ASTSource:
    """Return the source with the facts that Triton infers from a launcher's arguments: torch's memory is aligned, and
    some counts are multiples of 16."""
    signature, attrs = {}, {}
    for place, name in enumerate(variant.kernel.arg_names):
        if name in variant.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, multiple = variant.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or multiple:
            attrs[(place,)] = [["tt.divisibility", int(multiple or 16)]]
    return ASTSource(variant.kernel, signature, dict(variant.constexprs), attrs)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of local memory) of a thread, by the tool that comes with Triton."""
    backend = importlib.import_module("triton.backends.nvidia")
    tool = Path(backend.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {key: int(count) for key, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Return (registers, bytes of local memory) of a thread, from the assembler's notes."""
    counts = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)}
    return counts["vgpr_count"], counts["private_segment_fixed_size"]


def _name(variant: Variant) -> str:
    return str(variant.kernel.__name__).strip("_")


def label(variant: Variant) -> str:
    """Return a label such as ``bf16/u8 DIM=128 warps=4 without sinks``: element types, sizes and options, and arguments
    that are None."""
    given = (variant.signature[name] for name in variant.kernel.arg_names if name in variant.signature)
    types = dict.fromkeys(kind[1:].split(":")[0] for kind in given if kind.startswith("*"))
    facts = {name: value for name, value in variant.constexprs.items() if value is not None}
    facts |= {name.removeprefix("num_"): value for name, value in variant.options.items() if name not in FUSION}
    absent = ",".join(name for name, value in variant.constexprs.items() if value is None)
    words = ["/".join(types), *(f"{name}={value}" for name, value in facts.items())]
    return " ".join([*words, f"without {absent}"] if absent else words)


def _head_dim(variant: Variant) -> int:
    return max((variant.constexprs.get(name) or 0 for name in ("DIM", "HEAD_DIM", "DIM_PAD")), default=0)


# ---- the command -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("unset TRITON_INTERPRET: what is interpreted can't be compiled", file=sys.stderr)
        return 2
    unknown = set(options.target) - CARDS.keys()
    if unknown:
        print(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(CARDS)}", file=sys.stderr)
        return 2
    todo = [job for job in jobs(options.target, options.all) if options.kernel in job.module]
    done = sorted(_compiled(todo, options.processes), key=lambda each: (each.kernel, each.variant, each.target))
    if options.json:
        print(json.dumps({"triton": triton.__version__, "compiled": [asdict(each) for each in done]}, indent=1))
    else:
        print(_table(done))
    broken = [(each, complaint) for each in done for complaint in each.complaints]
    for each, complaint in broken:
        print(f"{each.kernel} [{each.variant}] on {each.target}: {complaint}", file=sys.stderr)
    return 1 if broken else 0


def _compiled(todo: Sequence[Job], num_processes: int) -> Iterator[Compiled]:
    """Yield results as they are completed, and report them on stderr."""
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(run, job) for job in todo]
        for number, future in enumerate(as_completed(waiting), 1):
            each = future.result()
            _tell(f"{number}/{len(todo)}  {each.kernel}  {each.target}  {each.seconds:.1f} s")
            yield each
    _tell("")


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def _table(done: Sequence[Compiled]) -> str:
    rows = [("kernel", "variant", "target", "registers", "shared", "spills")]
    rows += [
        (each.kernel, each.variant, each.target, str(each.registers), str(each.shared_bytes), str(each.spill_bytes))
        for each in done
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    left = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    return "\n".join(
        "  ".join(align(cell, width) for align, cell, width in zip(left, row, widths, strict=True)) for row in rows
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paged_kernels.triton.compile",
        description="Compile every Triton kernel without a GPU; hold registers, shared memory and spills to limits.",
        epilog="Exit status 1: a limit is broken. Shared memory and spills are bytes; spills are a thread's.",
    )
    names = ",".join(CARDS)
    parser.add_argument("--target", type=lambda text: text.split(","), default=names.split(","), metavar=names)
    parser.add_argument("--kernel", default="", metavar="PART", help="only modules whose name holds this")
    parser.add_argument("--all", action="store_true", help="every variant, not only those common in practice")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())

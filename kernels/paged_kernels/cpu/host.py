"""What the host's processor can do, and which product it should use. This is decided here only."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache

import llvmlite.binding as llvm
import torch

from paged_kernels.cpu import amx, amx_int8, dot_bf16, dot_int8, fma
from paged_kernels.cpu.integer_product import IntegerProduct
from paged_kernels.cpu.intrinsics import LANES
from paged_kernels.cpu.product import Product

BF16 = (amx.AMX, dot_bf16.DOT, fma.WIDENED)
"""Products of bfloat16, in order of preference."""

INTEGERS = (amx_int8.AMX, dot_int8.DOT, dot_int8.WIDENED)
"""Products of integers, in order of preference. All give the same bits."""

_OF = {torch.float32: (fma.FLOAT32,), torch.bfloat16: BF16}

# By bits of the weights: up to so many rows, vectors are used where the host has tiles too. A tile takes as long for
# one row as for 16, and 4-bit weights must be unpacked into memory for it.
FEW_ROWS = {8: 4, 4: 8}

# On these processors vdpbf16ps takes two cycles, and a float32 multiply-add half a cycle: widened bfloat16 is faster.
_SLOW_DOT = frozenset({"sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d"})

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # system call and constants of Linux on x86-64


def choose(dtype: torch.dtype, wanted: Product | None = None) -> Product:
    """Return the product that this host uses for weights of ``dtype``, for all numbers of rows. It is a single one,
    because two products don't add in the same order, and a row's result must not depend on how many rows come with it.

    Raises:
        ValueError: ``wanted`` is for another dtype, or can't run here.
    """
    if wanted is None:
        return next(product for product in _OF[dtype] if can_run(product) and not _is_slow(product))
    if wanted.dtype is not dtype or not can_run(wanted):
        raise ValueError(f"{wanted.name!r} for weights of {wanted.dtype} can't compute weights of {dtype} on this host")
    return wanted


@cache
def choose_attention() -> str:
    """Return how this host computes attention of bfloat16 queries over bfloat16, int8 or float8 K/V: "amx", "dot", or
    "float" (widened, as for all other dtypes)."""
    return {amx.AMX: "amx", dot_bf16.DOT: "dot"}.get(choose(torch.bfloat16), "float")


def choose_integers(bits: int, wanted: IntegerProduct | None = None) -> tuple[IntegerProduct, IntegerProduct, int]:
    """Return the integer products that this host uses for weights of so many bits: for few rows, for more rows, and how
    many are few. Both give the same bits.

    Raises:
        ValueError: ``wanted`` can't run here.
    """
    if wanted is None:
        few, many = (next(p for p in ways if can_run(p)) for ways in (INTEGERS[1:], INTEGERS))
        return few, many, FEW_ROWS[bits]
    if not can_run(wanted):
        raise ValueError(f"{wanted.name!r} can't compute products of integers on this host")
    return wanted, wanted, 0


def can_run(product: Product | IntegerProduct) -> bool:
    """Return whether this host has the product's instructions, and may use them."""
    if product is amx.AMX:
        return has("amx-tile", "amx-bf16") and _tiles_are_permitted()
    if product is amx_int8.AMX:
        return has("amx-tile", "amx-int8") and _tiles_are_permitted()
    if product is dot_int8.DOT:
        return has("avx512f", "avx512vnni") if LANES == 16 else has("avxvnni")
    return product is not dot_bf16.DOT or has("avx512f", "avx512bf16")


def has(*features: str) -> bool:
    """Return whether the processor has all of these features, in LLVM's names, and the operating system saves their
    registers."""
    found = llvm.get_host_cpu_features()
    return all(found.get(feature) for feature in features)


def _is_slow(product: Product) -> bool:
    # By name, where the tiles are hidden; but an older LLVM doesn't know the name.
    by_name = llvm.get_host_cpu_name() in _SLOW_DOT
    return product is dot_bf16.DOT and (by_name or has("amx-tile"))


@cache
def _tiles_are_permitted() -> bool:
    """Ask Linux, once per process, for permission to use AMX's tiles, because they make a thread's saved state 8 KiB
    larger. The permission holds for all threads, also for those that run already."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    call = ctypes.CDLL(None).syscall
    call.argtypes, call.restype = [ctypes.c_long] * 3, ctypes.c_long
    return bool(call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)

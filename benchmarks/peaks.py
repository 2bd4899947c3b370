"""The peak rate of each instruction: alone, on one thread, with all operands in registers. GFLOP/s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from paged_kernels.cpu import amx, amx_int8, dot_bf16, dot_int8, fma, host
from paged_kernels.cpu.integer_product import IntegerProduct
from paged_kernels.cpu.intrinsics import LANES
from paged_kernels.cpu.memory import store_i64
from paged_kernels.cpu.passes import KStep
from paged_kernels.cpu.product import Product

SUMS = 24 if LANES == 16 else 12  # sums in registers at once, to hide an instruction's latency
TIMES = 2000  # rounds in one call
_i8, _i64 = ir.IntType(8), ir.IntType(64)


def measure(product: Product | IntegerProduct, repeats: int = 300) -> float:
    """The rate of a product's instruction. Multiplications and additions count one each."""
    run, flop = _of(product)
    config = np.zeros(16, np.int64)  # room for a whole line: the tiles' configuration, or what is multiplied
    address = -(-config.ctypes.data // 64) * 64
    best = float("inf")
    for turn in range(repeats + 1):
        start = time.thread_time()
        run(address, TIMES)
        if turn:  # the first compiles
            best = min(best, time.thread_time() - start)
    return flop * TIMES / best / 1e9


def _of(product: Product | IntegerProduct) -> tuple[Callable[[int, int], None], int]:
    """A function that runs ``times`` rounds of it, and the operations of one round."""
    if product is amx.AMX:
        return _tiles("tdpbf16ps"), 4 * 2 * 16 * 16 * 32
    if product is amx_int8.AMX:
        return _tiles("tdpbsud"), 4 * 2 * 16 * 16 * 64
    if product is dot_bf16.DOT:
        return _vectors(dot_bf16.STEP), SUMS * 2 * 2 * LANES
    if isinstance(product, IntegerProduct):
        return _vectors(dot_int8.make_step(8, product is dot_int8.DOT)), SUMS * 2 * 4 * LANES
    return _vectors(fma.STEP), SUMS * 2 * LANES


def _hidden(b: Any, value: Any) -> Any:
    """The value, hidden from the compiler, which would otherwise turn a loop of equal additions into one product."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], side_effect=True)


def _vectors(step: KStep) -> Callable[[int, int], None]:
    def emit(b: Any, noughts: Any, times: Any) -> None:
        pointer, kind = b.inttoptr(noughts, _i8.as_pointer()), ir.VectorType(step.sum_type, LANES)
        x, weights = step.spread(b, pointer), step.load(b, pointer)[0]
        nothing, start = ir.Constant(kind, [ir.Constant(step.sum_type, 0)] * LANES), b.block
        loop, done = b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        number, sums = b.phi(_i64), [b.phi(kind) for _ in range(SUMS)]
        rows = [_hidden(b, x) for _ in range(SUMS // 2)]  # each is multiplied by two vectors of weights
        new = [step.add(b, rows[n // 2], weights, each) for n, each in enumerate(sums)]
        following = b.add(number, _i64(1))
        number.add_incoming(_i64(0), start)
        number.add_incoming(following, loop)
        for phi, then in zip(sums, new, strict=True):
            phi.add_incoming(nothing, start)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, times), loop, done)
        b.position_at_end(done)
        for each in new:
            _hidden(b, each)

    rounds = _intrinsic(emit)

    @njit(nogil=True)
    def run(noughts, times):  # type: ignore[no-untyped-def]
        rounds(noughts, times)

    return run  # type: ignore[no-any-return]


def _tiles(instruction: str) -> Callable[[int, int], None]:
    def emit(b: Any, config: Any, times: Any) -> None:
        for h, c in ((h, c) for h in range(2) for c in range(2)):
            amx.call(b, "tilezero", _i8(amx.SUMS[h][c]))
        for register in (*amx.X, *amx.W):
            amx.call(b, "tilezero", _i8(register))
        with cgutils.for_range(b, times):
            for h, c in ((h, c) for h in range(2) for c in range(2)):
                amx.call(b, instruction, _i8(amx.SUMS[h][c]), _i8(amx.X[h]), _i8(amx.W[c]))

    return _with_tiles(_intrinsic(emit))


def _intrinsic(emit: Callable[[Any, Any, Any], None]) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        emit(builder, *args)
        return context.get_dummy_value()

    return intrinsic(lambda typingctx, address, times: (types.void(types.int64, types.int64), codegen))


def _with_tiles(rounds: Any) -> Callable[[int, int], None]:
    load_config, release = amx.load_config, amx.release

    @njit(nogil=True)
    def run(config, times):  # type: ignore[no-untyped-def]
        store_i64(config, 0, 1)
        for word in range(2, 4):
            store_i64(config, word, 0x0040004000400040)
        store_i64(config, 6, 0x1010101010101010)
        load_config(config)
        rounds(config, times)
        release()

    return run  # type: ignore[no-any-return]


if __name__ == "__main__":
    for each in (*host.BF16, fma.FLOAT32, *host.INTEGERS):
        if host.can_run(each):
            print(f"{each.name:>12}: {measure(each):6.0f} GFLOP/s")

"""Repeats kernels that were launched once, by one call from Python, on other tensors and numbers of rows.

Between two launches Python takes 10 to 15 microseconds, and twice that if weights have displaced its code and data from
the caches; a step of a model with 30 layers has 240 launches. A ``Replay`` repeats what a Recorder has recorded
(recording.py). Tensors that change with each call are recognised by their addresses among the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from paged_kernels.cpu import parallel
from paged_kernels.cpu.memory import load_i64, store_i64
from paged_kernels.cpu.recording import Launch, Recorder

_LINE = 64  # bytes; arguments begin at a multiple
_LAUNCHER, _COUNT, _NUM_ROWS, _FIRST = range(4)  # the table's fields; for each launch follow:
_KERNEL, _IMAGE, _WORDS, _PLACE, _THREADS, _ROWS_AT, _ALONE_ROWS, _ENTRY = range(8)

_i32, _byte = ir.IntType(32), ir.IntType(8).as_pointer()


def replay_of(recorder: Recorder, tensors: Sequence[Tensor], num_launches: int) -> Replay | None:
    """Return a Replay of what was recorded, for ``tensors`` (contiguous) that change with each call. Returns None if
    the recording is spoilt, or has another number of launches than expected."""
    whole = not recorder.spoiled and len(recorder.launches) == num_launches
    if not whole or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return Replay(recorder.launches, tensors, recorder.kept)


class Replay:
    """Launches, one after another. Only one thread at a time may call it."""

    def __init__(self, launches: Sequence[Launch], tensors: Sequence[Tensor], kept: Any) -> None:
        sizes = [len(each.arguments) // 8 for each in launches]
        self._images = torch.frombuffer(bytearray(b"".join(each.arguments for each in launches)), dtype=torch.int64)
        self._work = torch.empty(8 * max(sizes) + _LINE, dtype=torch.uint8)
        self._kept = kept
        places = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        self._moves = [
            (at, which, word - first)
            for at, word in enumerate(self._images.tolist())
            for which, (first, end) in enumerate(places)
            if first <= word < end
        ]
        self._words = self._images.numpy().data
        work = -(-self._work.data_ptr() // _LINE) * _LINE
        table, image = [parallel.launcher_address(), len(launches), 0], self._images.data_ptr()
        for (kernel, _, address, num_threads, layout), size in zip(launches, sizes, strict=True):
            place = address if layout.in_place else work
            table += [kernel, image, size, place, num_threads, layout.rows_at, layout.alone_rows]
            image += 8 * size
        self._table = torch.tensor(table, dtype=torch.int64)
        self._address, self._entries = self._table.data_ptr(), self._table.numpy().data

    def __call__(self, num_rows: int, *tensors: Tensor) -> None:
        """Repeat the launches with tensors of ``num_rows`` rows, of the dtypes and widths of the recorded ones."""
        addresses, words = [t.data_ptr() for t in tensors], self._words
        for at, which, offset in self._moves:
            words[at] = addresses[which] + offset
        self._entries[_NUM_ROWS] = num_rows
        _launch_all.here(self._address)


@intrinsic  # type: ignore[untyped-decorator]
def _launch(typingctx: Any, launcher: Any, function: Any, data: Any, num_threads: Any) -> Any:
    """Call GOMP_parallel(function, data, num_threads, 0), or function(data) without a launcher."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        launcher, function, data, num_threads = args
        function, data = b.inttoptr(function, _byte), b.inttoptr(data, _byte)
        alone = ir.FunctionType(ir.VoidType(), [_byte])
        shared = ir.FunctionType(ir.VoidType(), [_byte, _byte, _i32, _i32])
        with b.if_else(cgutils.is_not_null(b, launcher)) as (then, otherwise):
            with then:
                start = b.inttoptr(launcher, shared.as_pointer())
                b.call(start, [function, data, b.trunc(num_threads, _i32), _i32(0)])
            with otherwise:
                b.call(b.bitcast(function, alone.as_pointer()), [data])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@parallel.kernel
def _launch_all(table):  # type: ignore[no-untyped-def]
    """Each launch gets a copy of its arguments, because kernels count in them."""
    launcher, num_rows = load_i64(table, _LAUNCHER), load_i64(table, _NUM_ROWS)
    for number in range(load_i64(table, _COUNT)):
        entry = table + 8 * (_FIRST + _ENTRY * number)
        image, place = load_i64(entry, _IMAGE), load_i64(entry, _PLACE)
        for word in range(load_i64(entry, _WORDS)):
            store_i64(place, word, load_i64(image, word))
        store_i64(place, load_i64(entry, _ROWS_AT), num_rows)
        num_threads = load_i64(entry, _THREADS)
        if num_rows <= load_i64(entry, _ALONE_ROWS):
            num_threads = 1
        _launch(launcher, load_i64(entry, _KERNEL), place, num_threads)

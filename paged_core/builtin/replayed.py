"""Computations that are launches of a CPU's kernels and nothing else: from the third time on, one call from Python.

This file knows tensors and when a recording holds. How launches are noted is paged_kernels' business (replay.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paged_kernels.cpu.replay import Replay

MOST_ROWS = 64  # of more, a step takes long enough for Python's part not to be seen


class Rooms(threading.local):
    """Memory for what lies between two launches: the same for all layers that compute as many rows in this thread."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[object, ...], Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that holds anything."""
        key = (name, *shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(*shape, dtype=dtype, device="cpu")
        return self._tensors[key]


Compute = Callable[[Any, Tensor, Sequence[Tensor], Rooms], None]
"""``compute(basis, out, tensors, rooms)`` fills ``out``. All that it computes with is in ``basis`` or ``tensors``."""


class _Known(NamedTuple):
    num_threads: int
    dtypes: list[torch.dtype]
    replay: Replay | None  # None: it is no such computation


class Replayed(threading.local):
    """``compute``, replayed where it can be. Each thread makes recordings of its own.

    Args:
        num_launches: of kernels, of which it consists.
    """

    def __init__(self, compute: Compute, num_launches: int) -> None:
        self._compute, self._num_launches = compute, num_launches
        self._basis: tuple[Any, ...] = ()
        self._known: dict[int, _Known | None] = {}  # by rows; None: they have been seen once

    def __call__(self, basis: tuple[Any, ...], out: Tensor, *tensors: Tensor) -> Tensor:
        """Fill ``out [T, ...]`` from ``tensors``; what is in ``basis`` is compared by identity."""
        if len(basis) != len(self._basis) or not all(map(is_, basis, self._basis)):
            self._basis, self._known = basis, {}
        num_rows, known = len(out), None
        if 0 < num_rows <= MOST_ROWS:
            if num_rows not in self._known:
                self._known[num_rows] = None
            else:
                known = self._known[num_rows]
                if known is None or not _holds(known, tensors):
                    return self._record(basis, out, tensors)
        if known is None or known.replay is None:
            self._compute(basis, out, tensors, _ROOMS)
        else:
            known.replay(out, *tensors)
        return out

    def _record(self, basis: tuple[Any, ...], out: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        from paged_kernels.cpu.recording import Recorder
        from paged_kernels.cpu.replay import replay_of

        with Recorder() as recorder:
            self._compute(basis, out, tensors, _ROOMS)
        replay = replay_of(recorder, [out, *tensors], self._num_launches)
        dtypes = [tensor.dtype for tensor in tensors]
        self._known[len(out)] = _Known(torch.get_num_threads(), dtypes, replay)
        return out


def _holds(known: _Known, tensors: Sequence[Tensor]) -> bool:
    return torch.get_num_threads() == known.num_threads and all(
        tensor.dtype is dtype and tensor.is_contiguous() for tensor, dtype in zip(tensors, known.dtypes, strict=True)
    )


_ROOMS = Rooms()

"""Computations that are launches of a CPU's kernels and nothing else: from the second time on, one call from Python.

This file knows tensors and when a recording holds. How launches are noted is paged_kernels' business (replay.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paged_kernels.cpu.replay import Replay

_FEWEST_ROWS = 16  # that there is room for
MOST_ROWS = 1024  # of more, a step takes long enough for Python's part not to be seen

Compute = Callable[[], None]
"""Fills a tensor that its maker has given it, by launches, whatever the number of rows."""


class Basis(NamedTuple):
    """All that launches depend on, besides the tensors that are others each time."""

    objects: Sequence[Any]  # compared by identity
    key: Hashable  # compared by value


class _Known(NamedTuple):
    least_rows: int
    most_rows: int
    num_threads: int
    dtypes: list[torch.dtype]
    replay: Replay | None  # None: it is no such computation


class Replayed(threading.local):
    """Computations replayed where they can be. Each thread makes recordings of its own.

    Args:
        num_launches: of kernels, of which it consists.
    """

    def __init__(self, num_launches: int) -> None:
        self._num_launches = num_launches
        self._basis = Basis((), None)
        self._known: list[_Known] = []

    def run(self, compute: Compute, basis: Basis, *tensors: Tensor) -> bool:
        """What ``compute()`` does with ``tensors``, of as many rows each. Returns whether it was done without asking
        it."""
        if not _same(basis, self._basis):
            self._basis, self._known = basis, []
        num_rows = len(tensors[0])
        if not 0 < num_rows <= MOST_ROWS:
            compute()
            return False
        known = next((each for each in self._known if each.least_rows <= num_rows <= each.most_rows), None)
        if known is None or not _holds(known, tensors):
            self._record(compute, tensors, known)
        elif known.replay is None:
            compute()
        else:
            known.replay(num_rows, *tensors)
            return True
        return False

    def _record(self, compute: Compute, tensors: Sequence[Tensor], known: _Known | None) -> None:
        from paged_kernels.cpu.recording import Recorder
        from paged_kernels.cpu.replay import replay_of

        if known is not None:
            self._known.remove(known)
        num_rows = len(tensors[0])
        with Recorder(_rooms(), max(_FEWEST_ROWS, 1 << (num_rows - 1).bit_length())) as recorder:
            compute()
        replay = replay_of(recorder, tensors, self._num_launches)
        dtypes = [tensor.dtype for tensor in tensors]
        num_threads = torch.get_num_threads()
        self._known.append(_Known(recorder.least_rows, recorder.most_rows, num_threads, dtypes, replay))


def _same(one: Basis, other: Basis) -> bool:
    return one.key == other.key and len(one.objects) == len(other.objects) and all(map(is_, one.objects, other.objects))


def _holds(known: _Known, tensors: Sequence[Tensor]) -> bool:
    return torch.get_num_threads() == known.num_threads and all(
        tensor.dtype is dtype and tensor.is_contiguous() for tensor, dtype in zip(tensors, known.dtypes, strict=True)
    )


_LOCAL = threading.local()


def _rooms() -> Any:
    """This thread's."""
    from paged_kernels.cpu.recording import Rooms

    if not hasattr(_LOCAL, "rooms"):
        _LOCAL.rooms = Rooms()
    return _LOCAL.rooms

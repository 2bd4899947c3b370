"""Computations that consist of CPU kernel launches only. From the second time on, Python makes a single call for all.

This file knows tensors, and how long a recording stays valid. replay.py in paged_kernels records the launches.
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

_FEWEST_ROWS = 16  # buffers have room for at least this many rows
MOST_ROWS = 1024  # a step of more rows takes so long that Python's share doesn't matter

Compute = Callable[[], None]
"""Fills a tensor that its maker has given it, by launches that don't depend on the number of rows."""


class Basis(NamedTuple):
    """All that the launches depend on, except the tensors that change with each call."""

    objects: Sequence[Any]  # compared by identity
    key: Hashable  # compared by value


class _Known(NamedTuple):
    least_rows: int
    most_rows: int
    num_threads: int
    dtypes: list[torch.dtype]
    replay: Replay | None  # None: the computation can't be replayed


class Replayed(threading.local):
    """Replays computations where possible. Each thread makes its own recordings.

    Args:
        num_launches: the number of kernel launches of the computation.
    """

    def __init__(self, num_launches: int) -> None:
        self._num_launches = num_launches
        self._basis = Basis((), None)
        self._known: list[_Known] = []

    def run(self, compute: Compute, basis: Basis, *tensors: Tensor) -> bool:
        """Do what ``compute()`` does with ``tensors``, which have the same number of rows. Returns whether it was
        replayed, without calling ``compute``."""
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
    """Return this thread's buffers."""
    from paged_kernels.cpu.recording import Rooms

    if not hasattr(_LOCAL, "rooms"):
        _LOCAL.rooms = Rooms()
    return _LOCAL.rooms

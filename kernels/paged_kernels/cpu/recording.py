"""Records a thread's launches while they run, so that replay.py can repeat them with other numbers of rows.

Only launches are recorded. Code that copies or converts a tensor for a launch must call ``spoil_recording()``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ArgumentLayout(NamedTuple):
    """How a launch depends on its number of rows, and how many bytes of its arguments are recorded."""

    num_bytes: int
    rows_at: int  # index of the number of rows among the arguments, of 8 bytes each
    alone_rows: int = 0  # up to this many rows, one thread does the work
    in_place: bool = False  # more arguments follow the recorded ones, and the kernel must find them there


class Launch(NamedTuple):
    kernel: int
    arguments: bytes
    address: int  # where the arguments were
    num_threads: int
    layout: ArgumentLayout


class Recorder:
    """Inside its ``with`` block, records this thread's launches, which are valid for ``least_rows`` to ``most_rows``
    rows. A launcher that does something else for other numbers of rows narrows these."""

    def __init__(self, rooms: Rooms, most_rows: int) -> None:
        self.least_rows, self.most_rows, self.spoiled = 1, most_rows, False
        self.launches: list[Launch] = []
        self.kept: list[Any] = []
        self._rooms, self._capacity = rooms, most_rows

    def __enter__(self) -> Recorder:
        recording.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        recording.recorder = None

    def add(self, kernel: int, args: int, num_threads: int, layout: ArgumentLayout | None) -> None:
        """Record a launch that is about to be made. Without a layout it can't be repeated."""
        if layout is None:
            self.spoiled = True
        else:
            self.launches.append(Launch(kernel, ctypes.string_at(args, layout.num_bytes), args, num_threads, layout))

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return ``shape [rows, ...]``, in memory with room for the most rows."""
        room = self._rooms.room(name, (self._capacity, *shape[1:]), dtype)
        self.kept.append(room)
        return room[: shape[0]]


class Rooms:
    """Reused buffers for results between launches. All recordings with the same number of rows share them."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[object, ...], Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
        key = (name, *shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(*shape, dtype=dtype, device="cpu")
        return self._tensors[key]


class _Recording(threading.local):
    recorder: Recorder | None = None  # records this thread's launches


recording = _Recording()


def room(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor ``[rows, ...]`` that only the next launches of this thread need. Other tensors of
    the same name and shape may share its memory."""
    if recording.recorder is None:
        return torch.empty(*shape, dtype=dtype, device="cpu")
    return recording.recorder.room(name, shape, dtype)


def most_rows(num_rows: int) -> int:
    """Return the number of rows that buffers need room for: more than ``num_rows``, if the launch is being recorded."""
    return num_rows if recording.recorder is None else max(num_rows, recording.recorder.most_rows)


def hold_for(least: int, most: int | None = None) -> None:
    """Declare that the next launch is made in this way for these numbers of rows only (None: no upper limit)."""
    recorder = recording.recorder
    if recorder is not None:
        recorder.least_rows = max(recorder.least_rows, least)
        recorder.most_rows = recorder.most_rows if most is None else min(recorder.most_rows, most)


def keep_for_recording(memory: Any) -> None:
    """Keep memory alive that the next launch uses and its caller may free."""
    if recording.recorder is not None:
        recording.recorder.kept.append(memory)


def spoil_recording() -> None:
    """Declare that the launches can't be repeated: one of them uses memory that won't exist then, or something is
    computed between them."""
    if recording.recorder is not None:
        recording.recorder.spoiled = True

"""What a thread launches, noted while it runs as always: for replay.py, which runs it again with other numbers of rows.

Nothing but launches is seen. Whoever copies or converts a tensor on the way to one says ``spoil_recording()``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ArgumentLayout(NamedTuple):
    """What of a launch changes with the number of rows that it is for, and how much of its arguments are noted."""

    num_bytes: int
    rows_at: int  # which of the arguments, of 8 bytes each, is the number of rows
    alone_rows: int = 0  # up to so many rows one thread does it
    in_place: bool = False  # behind those that are noted lie others, which the kernel is to find there


class Launch(NamedTuple):
    kernel: int
    arguments: bytes
    address: int  # where they lay
    num_threads: int
    layout: ArgumentLayout


class Recorder:
    """While it is entered, notes what this thread launches, for ``least_rows`` to ``most_rows`` rows: a launcher that
    does something else for others narrows these."""

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
        """A launch that is about to be made; without a layout it can't be made again."""
        if layout is None:
            self.spoiled = True
        else:
            self.launches.append(Launch(kernel, ctypes.string_at(args, layout.num_bytes), args, num_threads, layout))

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``shape [rows, ...]``, in memory that is there for the most rows."""
        room = self._rooms.room(name, (self._capacity, *shape[1:]), dtype)
        self.kept.append(room)
        return room[: shape[0]]


class Rooms:
    """Memory for what lies between two launches: all recordings for as many rows share it."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[object, ...], Tensor] = {}

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that holds anything."""
        key = (name, *shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty(*shape, dtype=dtype, device="cpu")
        return self._tensors[key]


class _Recording(threading.local):
    recorder: Recorder | None = None  # who looks on at what this thread launches


recording = _Recording()


def room(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor ``[rows, ...]`` that holds anything: for what the next launches of this thread alone need. Others of the
    same name and shape may lie in the same memory."""
    if recording.recorder is None:
        return torch.empty(*shape, dtype=dtype, device="cpu")
    return recording.recorder.room(name, shape, dtype)


def most_rows(num_rows: int) -> int:
    """For how many rows there must be room: for more than ``num_rows``, if the launch will be made again."""
    return num_rows if recording.recorder is None else max(num_rows, recording.recorder.most_rows)


def hold_for(least: int, most: int | None = None) -> None:
    """The launch to come is made so for these numbers of rows only (None: for any beyond ``least``)."""
    recorder = recording.recorder
    if recorder is not None:
        recorder.least_rows = max(recorder.least_rows, least)
        recorder.most_rows = recorder.most_rows if most is None else min(recorder.most_rows, most)


def keep_for_recording(memory: Any) -> None:
    """A launch to come uses memory that its caller may let go."""
    if recording.recorder is not None:
        recording.recorder.kept.append(memory)


def spoil_recording() -> None:
    """A launch reads or writes what isn't there when it is made again, or something is computed beside launches."""
    if recording.recorder is not None:
        recording.recorder.spoiled = True

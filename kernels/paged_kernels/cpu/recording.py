"""What a thread launches, noted while it runs as always: for replay.py, which runs it again.

Nothing but launches is seen. Whoever copies or converts a tensor on the way to one says ``spoil_recording()``.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any


class Recorder:
    """While it is entered, notes what this thread launches."""

    def __init__(self) -> None:
        self.spoiled = False
        self.launches: list[tuple[int, bytes, int]] = []  # kernel, its arguments, threads
        self.kept: list[Any] = []

    def __enter__(self) -> Recorder:
        recording.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        recording.recorder = None

    def add(self, kernel: int, args: int, num_threads: int, num_bytes: int) -> None:
        """A launch that is about to be made; ``num_bytes`` of arguments, 0 if that isn't known."""
        self.spoiled |= not num_bytes
        self.launches.append((kernel, ctypes.string_at(args, num_bytes), num_threads))


class _Recording(threading.local):
    recorder: Recorder | None = None  # who looks on at what this thread launches


recording = _Recording()


def keep_for_recording(memory: Any) -> None:
    """A launch to come uses memory that its caller may let go."""
    if recording.recorder is not None:
        recording.recorder.kept.append(memory)


def spoil_recording() -> None:
    """A launch reads or writes what isn't there when it is made again, or something is computed beside launches."""
    if recording.recorder is not None:
        recording.recorder.spoiled = True

"""ThreadPolicy: what an EngineThread does for its owner."""

from __future__ import annotations

from typing import Any


class ThreadPolicy:
    """The owner's side of an EngineThread, which calls ``step``, ``idle`` and ``failed``."""

    @property
    def idle_s(self) -> float | None:
        """Seconds to wait for a command when idle, before ``idle`` is called. None: for ever."""
        return None

    def step(self) -> bool:
        """Compute a batch and pass its results on. Returns False if nothing can be computed until a command comes."""
        raise NotImplementedError

    def idle(self) -> None:
        """Called when the thread is idle and no command has come. A step follows."""

    def failed(self, error: BaseException) -> None:
        """A step or a command has raised, or the lock is never released: tell those who wait for results."""
        raise NotImplementedError

    def forked(self, holders: set[Any], ran: bool) -> None:
        """Called in a forked child. ``holders`` held the thread in the parent; ``ran``: whether it ran there."""
        raise NotImplementedError

    def shut_down(self) -> None:
        """End the thread, because the interpreter exits. A thread inside torch would crash the process at exit."""
        raise NotImplementedError

"""ThreadPolicy: what the owner of an EngineThread says of it. It knows nothing else."""

from __future__ import annotations

from typing import Any


class ThreadPolicy:
    """What an EngineThread does, and for whom. ``step``, ``idle`` and ``failed`` are called in it."""

    @property
    def idle_s(self) -> float | None:
        """With nothing to compute, how long it waits for a command before it calls ``idle``. None: for ever."""
        return None

    def step(self) -> bool:
        """Compute a batch, and hand out what is new. False: nothing can be computed until a command comes."""
        raise NotImplementedError

    def idle(self) -> None:
        """Nothing could be computed, and nothing was asked for. A step follows."""

    def failed(self, error: BaseException) -> None:
        """A step or a command has raised, or nobody gives the lock back: tell those who wait for what won't come."""
        raise NotImplementedError

    def forked(self, holders: set[Any], ran: bool) -> None:
        """In a forked child. In the parent the thread had those holders, and ``ran`` or not."""
        raise NotImplementedError

    def shut_down(self) -> None:
        """The interpreter exits: end the thread. One that is inside torch then takes the process down with it."""
        raise NotImplementedError

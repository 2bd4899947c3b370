"""Lifecycle: whether an engine may be called now. It must be alive and between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from paged_core.errors import EngineDeadError, ReentryError


class Lifecycle:
    """The lifecycle of one engine, which begins alive and between two steps."""

    def __init__(self) -> None:
        self._dead: str | None = None  # why the engine takes no more requests; None: it is alive
        self._in_step = False

    @property
    def alive(self) -> bool:
        return self._dead is None

    def end(self, reason: str) -> None:
        self._dead = reason

    def check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine takes no more requests: {self._dead}")

    def check_between_steps(self, call: str) -> None:
        if self._in_step:
            raise ReentryError(
                f"{call} was called during a step of the same engine, which has to end first: from inside it (by a "
                "logits processor, a selector or the model, say) or from another thread; call it between two steps"
            )

    @contextmanager
    def step(self, undo: Callable[[], None]) -> Iterator[None]:
        """Use this around a step. If anything ends the step early, requests stay as they were before it, and ``undo``
        is called for the rest."""
        self._in_step = True
        try:
            with self._death_noted(), self.device_looked_after():
                yield
        except BaseException:
            undo()
            raise
        finally:
            self._in_step = False

    @contextmanager
    def device_looked_after(self) -> Iterator[None]:
        """End the engine at an error of the device, after which the device usually computes nothing more in this
        process."""
        try:
            yield
        except torch.AcceleratorError as error:
            self._dead = f"its device has failed, which takes a new process: {error}"
            raise EngineDeadError(self._dead) from error

    @contextmanager
    def _death_noted(self) -> Iterator[None]:
        try:
            yield
        except EngineDeadError as error:
            self._dead = str(error)
            raise

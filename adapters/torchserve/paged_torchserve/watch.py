"""Watch: a thread that looks after a worker while TorchServe is silent."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from paged_core import AsyncEngine
from paged_torchserve.desk import Desk

_log = logging.getLogger("paged_torchserve")


class Watch:
    """Frees what requests hold when TorchServe stops asking for their news (the last client has left: there is no other
    sign of it), flushes metrics, and ends the process when the engine has failed and all have been told: TorchServe
    then starts another.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        desk: Desk,
        flush: Callable[[], None],
        heartbeat_s: float,
        give_up: Callable[[int], None] = os._exit,
    ) -> None:
        self._engine, self._desk, self._flush, self._give_up = engine, desk, flush, give_up
        self._heartbeat_s = heartbeat_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paged-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(min(1.0, self._heartbeat_s / 2)):
            # In this order: a step that begins meanwhile is seen as open, or has set last_call before.
            waits = not self._desk.in_step and not self._desk.is_empty
            silent = time.monotonic() - self._desk.last_call > self._heartbeat_s
            if waits and silent:
                self._desk.drop_all()
            if not self._engine.alive and (self._desk.is_empty or silent):
                _log.error("the engine has failed; this worker ends")
                self._give_up(1)
                return
            self._flush()

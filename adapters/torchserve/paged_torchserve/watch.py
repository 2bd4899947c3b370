"""Watch: a thread that watches a worker when TorchServe does not call it, or the engine is stuck."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from paged_core import AsyncEngine, EngineDeadError
from paged_serving import trouble
from paged_torchserve.desk import Desk

_QUIET_S = 0.5  # without a call and without a request: the last reply has been sent
_PARTING_S = 10.0  # at most, to send the engine's failure to all clients
_log = logging.getLogger("paged_torchserve")


class Watch:
    """Frees the requests' resources when TorchServe stops calling (the only sign that the last client has left), and
    flushes metrics. When an engine has failed, or one of its steps takes longer than ``max_step_s``, all clients get an
    error, and then the process ends; TorchServe starts another.
    """

    def __init__(
        self,
        engines: Sequence[AsyncEngine],
        desk: Desk,
        flush: Callable[[], None],
        heartbeat_s: float,
        max_step_s: float,
        give_up: Callable[[int], None] = os._exit,
    ) -> None:
        self._engines, self._desk, self._flush, self._give_up = engines, desk, flush, give_up
        self._heartbeat_s, self._max_step_s = heartbeat_s, max_step_s
        self._ended = threading.Event()
        self._failed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="paged-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(min(1.0, self._heartbeat_s / 2)):
            for look in (self._look, self._flush):
                try:
                    look()
                except Exception:  # the watch must continue
                    _log.exception("the watch could not do all of its work")

    def _look(self) -> None:
        if self._failed_at is not None:
            told = self._desk.is_empty and self._desk.silence_s > _QUIET_S
            if told or time.monotonic() - self._failed_at > _PARTING_S:
                self._give_up(1)
                self._ended.set()
            return
        failures = [trouble(engine, self._max_step_s, "responseTimeout") for engine in self._engines]
        for failure in filter(None, failures):
            _log.error("%s; this worker ends", failure)
            self._failed_at = time.monotonic()
            self._desk.refuse_all_soon(EngineDeadError(failure))
        self._desk.drop_if_silent(self._heartbeat_s)

"""Starts the trial process when it is first needed, and again if it has died, and asks it."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from multiprocessing.connection import Connection

from paged_core import InvalidRequestError, PluginError
from paged_serving.grammars.compiling import Vocabulary

_START = (
    "import sys; sys.path[:] = {path!r}; from paged_serving.grammars.trial_process import serve; serve({fd}, {max_ms})"
)
_PATIENCE_S = 60.0  # for a verdict; the process has limits of its own


class Trials:
    """Callable from any thread. The process ends when this object does, or its process."""

    def __init__(self, vocabulary: Vocabulary, max_ms: int) -> None:
        self._vocabulary, self._max_ms = vocabulary, max_ms
        self._lock = threading.Lock()  # guards the connection that is in use
        self._numbers = itertools.count()
        self._open: _TrialProcess | None = None

    def verdict(self, grammar: str) -> str | None:
        """The error of ``grammar``, or None. Waits for the verdict.

        Raises:
            InvalidRequestError: there was no verdict: try again later.
            PluginError: no process can be started.
        """
        for _ in range(2):  # it may have died for another reason
            with suppress(ConnectionError, FutureTimeoutError):
                return self._ask(grammar).result(_PATIENCE_S)
        raise InvalidRequestError("it could not be tried; ask again")

    def start(self) -> None:
        """Start the process now; it is there when the first grammar is asked for.

        Raises:
            PluginError: it can't be started.
        """
        with self._lock:
            self._running()

    def _ask(self, grammar: str) -> Future[str | None]:
        with self._lock:
            return self._running().ask(next(self._numbers), grammar)

    def _running(self) -> _TrialProcess:
        if self._open is None or self._open.gone:
            self._open = _TrialProcess(self._vocabulary, self._max_ms)
            weakref.finalize(self, self._open.close)
        return self._open


class _TrialProcess:
    """One process, as long as it lives."""

    def __init__(self, vocabulary: Vocabulary, max_ms: int) -> None:
        ours, theirs = socket.socketpair()
        start = _START.format(path=sys.path, fd=theirs.fileno(), max_ms=max_ms)
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-c", start], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
        except OSError as error:
            ours.close()
            raise PluginError(
                f"structured output needs a process of its own, which can't be started: {error}"
            ) from error
        self.pid = process.pid
        self._connection = Connection(ours.detach())
        self._pending: dict[int, Future[str | None]] = {}
        self.gone = False
        threading.Thread(target=self._listen, args=(process,), name="paged-trials", daemon=True).start()
        self._connection.send(vocabulary)

    def ask(self, number: int, grammar: str) -> Future[str | None]:
        answer: Future[str | None] = Future()
        self._pending[number] = answer
        try:
            self._connection.send((number, grammar))
        except OSError as error:
            self.gone = True
            raise ConnectionError("the process has died") from error
        return answer

    def close(self) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)  # wakes the reading thread, which a close would not

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, verdict = self._connection.recv()
                self._pending.pop(number).set_result(verdict)
        self.gone = True
        self._connection.close()
        process.wait()
        for answer in list(self._pending.values()):
            answer.set_exception(ConnectionError("the process has died"))

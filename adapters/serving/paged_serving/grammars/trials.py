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

from paged_core import EngineBusyError, PluginError
from paged_serving.grammars.compiling import Vocabulary

Answer = tuple[bool, str | None]  # whether the grammar was tried; what is wrong with it

_START = (
    "import os, sys; os.nice({nice}); sys.path[:] = {path!r};"
    "from paged_serving.grammars.trial_process import serve; serve({fd}, {max_ms})"
)
_NICE = 10  # of trials: a tenth of a processor that others want too
_PATIENCE_S = 60.0  # for a verdict, beside the limit; the process gives up sooner, unless many trials wait


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
            EngineBusyError: the machine is too busy for a verdict.
            PluginError: no process can be started.
        """
        for _ in range(2):  # it may have died for another reason
            with suppress(ConnectionError):
                return self._answer(grammar)
        raise EngineBusyError("the grammar could not be tried; ask again later")

    def start(self) -> None:
        """Start the process now; it is there when the first grammar is asked for.

        Raises:
            PluginError: it can't be started.
        """
        with self._lock:
            self._running()

    def _answer(self, grammar: str) -> str | None:
        answer = self._ask(grammar)
        with suppress(FutureTimeoutError):
            tried, verdict = answer.result(_PATIENCE_S + self._max_ms / 1000)
            if tried:
                return verdict
        raise EngineBusyError("the machine is too busy to try the grammar; ask again later")

    def _ask(self, grammar: str) -> Future[Answer]:
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
        start = _START.format(nice=_NICE, path=sys.path, fd=theirs.fileno(), max_ms=max_ms)
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
        self._pending: dict[int, Future[Answer]] = {}
        self.gone = False
        threading.Thread(target=self._listen, args=(process,), name="paged-trials", daemon=True).start()
        self._connection.send(vocabulary)

    def ask(self, number: int, grammar: str) -> Future[Answer]:
        answer: Future[Answer] = Future()
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
                number, *answer = self._connection.recv()
                self._pending.pop(number).set_result(tuple(answer))
        self.gone = True
        self._connection.close()
        process.wait()
        for answer in list(self._pending.values()):
            answer.set_exception(ConnectionError("the process has died"))

"""RankProcesses: starts, watches and ends the processes of the other ranks, and sends them orders.

None of these processes outlives rank 0, however rank 0 ends: each has a connection to it that the system then closes,
and checks besides which process is its parent. This file knows the standard library only.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from paged_core.errors import ConfigError, EngineDeadError, PagedCoreError, UnsupportedModel

_LAST_WORDS_S = 3.0  # how long a failed rank may take to say why, or to be found dead
_GOODBYE_S = 2.0  # how long a rank may take to end by itself
_LOOK_S = 1.0  # between two checks of the ranks during a step
PROGRAM = "import sys; sys.path[:] = {path!r}; from paged_core.engine.follower import main; main({fd})"
_TELLABLE = {kind.__name__: kind for kind in (ConfigError, UnsupportedModel)}


class LastWords(NamedTuple):
    """What a rank reports before it ends with an error."""

    kind: str  # the name of the exception's class
    message: str


class RankProcess(NamedTuple):
    """The process of one rank, and the connection to it."""

    rank: int
    popen: subprocess.Popen[bytes]
    connection: Connection


class RankProcesses:
    """Ranks 1 to ``size - 1``.

    Args:
        job: returns the work of the rank with that number; the work can be pickled.
        max_step_s: seconds after which a step counts as stuck. The other ranks are then killed, and rank 0's step
            fails.
        on_death: called in a thread of this object when a rank dies during a step.
    """

    def __init__(
        self,
        size: int,
        job: Callable[[int], Any],
        max_step_s: float = 300.0,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self.processes: list[RankProcess] = []
        self._ended: str | None = None  # why the ranks have ended; None: they run
        self._began: float | None = None  # when the current step began
        self._finalizer = weakref.finalize(self, _end, self.processes, 0.0)
        for rank in range(1, size):
            self.processes.append(start(rank, job(rank)))
        watch = threading.Thread(
            target=_watch, args=(weakref.ref(self), max_step_s, on_death), name="paged-ranks", daemon=True
        )
        watch.start()

    def wait_until_ready(self) -> None:
        """Wait until each rank has loaded what it needs in order to join.

        Raises:
            EngineDeadError, ConfigError, UnsupportedModel: a rank could not load it.
        """
        for process in self.processes:
            try:
                told = process.connection.recv()
            except (EOFError, OSError) as error:
                raise self.failed(error) from error
            if isinstance(told, LastWords):
                failure = _as_error(process.rank, told)
                self.end(str(failure), patience_s=0.0)
                raise failure

    def send(self, order: Any) -> None:
        """Send ``order`` to every rank.

        Raises:
            EngineDeadError: a rank has ended.
        """
        if self._ended is not None:
            raise EngineDeadError(self._ended)
        packed = pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            for process in self.processes:
                process.connection.send_bytes(packed)
        except OSError as error:
            raise self.failed(error) from error

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Use this around work that rank 0 computes with the others. If anything fails inside, the others are ended,
        because they may be in the middle of it.

        Raises:
            EngineDeadError: raised in place of any Exception from inside.
        """
        self._began = time.monotonic()
        try:
            yield
        except Exception as error:
            raise self.failed(error) from error
        except BaseException:
            self.end("a step was interrupted, and the other ranks were left in the middle of it")
            raise
        finally:
            self._began = None

    @property
    def trouble(self) -> str | None:
        """Why the ranks can't be used, if one has ended, or None. Any thread may ask."""
        if self._ended is not None:
            return self._ended
        dead = next((process for process in self.processes if process.popen.poll() is not None), None)
        return None if dead is None else _obituary(dead)

    def failed(self, error: BaseException) -> PagedCoreError:
        """End all ranks, and return the error to raise for ``error``, which came up while they were at work.

        If a rank has died or reported an error, that is the error returned; else ``error`` itself, if it is one of the
        project's."""
        known = isinstance(error, PagedCoreError)
        told = self._last_words(patience_s=0.0 if known else _LAST_WORDS_S)
        if told is None:
            own = error if isinstance(error, PagedCoreError) else None
            told = own or EngineDeadError(f"rank 0 has failed, and the engine with it: {error!r}; build a new one")
        self.end(str(told), patience_s=0.0)
        return told

    def end(self, why: str = "the engine was closed", patience_s: float = _GOODBYE_S) -> None:
        """End all ranks, and kill those that don't end in time. May be called again."""
        self._ended = self._ended or why
        _end(self.processes, patience_s)

    def _last_words(self, patience_s: float) -> PagedCoreError | None:
        """Return the error that a rank reported before it ended, or how its process ended."""
        if self._ended is not None:
            return EngineDeadError(self._ended)
        deadline = time.monotonic() + patience_s
        while True:
            for process in self.processes:
                told = _said(process.connection)
                if told is not None:
                    return _as_error(process.rank, told)
            for process in self.processes:
                if process.popen.poll() is not None:
                    return EngineDeadError(_obituary(process))
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.02)


def start(rank: int, job: Any) -> RankProcess:
    """Start a process and send it ``job``."""
    ours, theirs = Pipe()
    path = [entry or str(Path.cwd()) for entry in sys.path]
    program = PROGRAM.format(path=path, fd=theirs.fileno())
    try:
        popen = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=2,  # to standard error: a rank's prints are no output of this program
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that Ctrl-C reaches rank 0 only, which tells the others
            env={**os.environ, "LOCAL_RANK": str(rank)},
        )
    finally:
        theirs.close()
    ours.send(job)
    return RankProcess(rank, popen, ours)


def _end(processes: Sequence[RankProcess], patience_s: float) -> None:
    for process in processes:
        process.connection.close()
    deadline = time.monotonic() + patience_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(max(deadline - time.monotonic(), 0.0))
            continue
        process.popen.kill()
        process.popen.wait()


def _watch(processes: weakref.ref[RankProcesses], max_step_s: float, on_death: Callable[[], None] | None) -> None:
    """Watch the ranks until they have ended, so that rank 0 never waits for ever for a rank that does not answer."""
    while True:
        time.sleep(_LOOK_S)
        seen = processes()
        if seen is None or seen._ended is not None:
            return
        began = seen._began
        if began is None:
            continue
        if time.monotonic() - began > max_step_s:
            seen._ended = f"a step has not ended in {max_step_s:g} s: a rank is stuck, and the others were ended"
            for process in seen.processes:
                process.popen.kill()
        if on_death is not None and seen.trouble is not None:
            on_death()
            return


def _said(connection: Connection) -> LastWords | None:
    try:
        told = connection.recv() if connection.poll() else None
    except (EOFError, OSError):
        return None
    return told if isinstance(told, LastWords) else None


def _as_error(rank: int, failure: LastWords) -> PagedCoreError:
    if failure.kind in _TELLABLE:
        return _TELLABLE[failure.kind](failure.message)
    return EngineDeadError(f"rank {rank} has failed, and the engine with it: {failure.message}; build a new one")


def _obituary(process: RankProcess) -> str:
    code = process.popen.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"has ended with status {code}"
    return f"rank {process.rank} (process {process.popen.pid}) {how}, and the engine with it; build a new one"

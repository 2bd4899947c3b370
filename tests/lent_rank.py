"""One process that is rank 1 of one engine after another, because a rank's imports take seconds, and most tests need no
new one.

It does what ``paged_core.engine.follower.main`` does, again and again. Tests of processes start real ones.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from multiprocessing import Pipe

from paged_core.ranks.processes import RankProcess

_PROGRAM = """
import sys; sys.path[:] = {path!r}
import signal, socket
from multiprocessing.connection import Connection
from paged_core.engine.follower import follow
signal.signal(signal.SIGINT, signal.SIG_IGN)
control = socket.socket(fileno={fd})
while True:
    told, fds, *_ = socket.recv_fds(control, 1, 1)
    if not told:
        break
    follow(Connection(fds[0]))
    control.send(b"d")
"""


class LentRank:
    """``start`` replaces ``paged_core.ranks.processes.start``, for engines of two ranks, one at a time."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self, rank: int, job: object) -> RankProcess:
        assert rank == 1
        ours, theirs = Pipe()
        popen, control = self._process()
        socket.send_fds(control, [b"j"], [theirs.fileno()])
        theirs.close()
        ours.send(job)
        return RankProcess(rank, _Lent(popen, control), ours)

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def end(self) -> None:
        if self._popen is not None:
            self._control.close()
            try:
                self._popen.wait(20)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()

    def _process(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._popen is None or self._popen.poll() is not None:
            self.end()
            self._control, theirs = socket.socketpair()
            program = _PROGRAM.format(path=sys.path, fd=theirs.fileno())
            self._popen = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()])
            theirs.close()
        return self._popen, self._control


class _Lent:
    """What an engine sees of the process: it ends when the engine's job has ended."""

    def __init__(self, popen: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._popen, self._control = popen, control
        self._done = False
        self.pid = popen.pid

    @property
    def returncode(self) -> int | None:
        return 0 if self._done else self._popen.returncode

    def poll(self) -> int | None:
        return 0 if self._done else self._popen.poll()

    def wait(self, timeout: float | None = None) -> None:
        if self._done or self._popen.poll() is not None:
            return
        if not select.select([self._control], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a lent rank", timeout or 0.0)
        self._done = self._control.recv(1) == b"d"
        if not self._done:
            self._popen.wait()

    def kill(self) -> None:
        if not self._done:
            self._popen.kill()

"""One trial of a grammar: a fork that compiles it and follows it a little, within limits."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING

from paged_serving.grammars.compiling import compile_grammar
from paged_serving.grammars.reasons import why
from paged_serving.grammars.walks import trouble_ahead

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 192 * 2**20  # most memory of a trial besides the vocabulary
_BUSY_S = 30.0  # most wall time of a trial beside its processor time: then the machine is too busy for it
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # the signal that a process gets when the one that forked it ends


class Trial:
    """Runs from now on, and not longer than this process. ``end`` must follow: when ``told`` is ready, or when the time
    is ``ends``.

    Args:
        max_ms: of processor time.
        others: connections of this process, which the fork closes.
    """

    def __init__(
        self, number: int, grammar: str, tokenizer: llguidance.LLTokenizer, max_ms: int, others: Sequence[Connection]
    ) -> None:
        self._number, self._max_ms = number, max_ms
        self.told, telling = Pipe(duplex=False)
        self.ends = time.monotonic() + _BUSY_S + max_ms / 1000
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _end_with_parent()
                for each in (self.told, *others):
                    each.close()
                _limit(max_ms)
                telling.send(_try(tokenizer, grammar))
            finally:
                os._exit(0)
        telling.close()

    def busy_s(self) -> float:
        """Processor time that it has taken so far. Infinite where the system doesn't tell."""
        with suppress(OSError):
            return int(Path(f"/proc/{self._pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
        return math.inf

    def pause(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def end(self) -> tuple[int, bool, str | None]:
        """(number, whether it was tried, the error of the grammar), of a trial that has finished, died, or run out of
        time. One that the machine had no time for was not tried."""
        tried, verdict = self.told.poll(), None
        try:
            if tried:
                verdict = self.told.recv()
        except EOFError:
            verdict = f"it takes more than {MAX_BYTES >> 20} MiB"
        self.told.close()
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            tried, verdict = True, f"it takes more than {self._max_ms} ms, this server's limit (--max-grammar-ms)"
        return self._number, tried, verdict


def _end_with_parent() -> None:
    """A paused fork would never notice that nobody waits for it."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _limit(max_ms: int) -> None:
    import resource

    with suppress(FileNotFoundError):  # Linux's; elsewhere only time is limited
        now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MAX_BYTES, now + MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides Rust's message before it aborts
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, max_ms / 1000)  # processor time, independent of the machine's load


def _try(tokenizer: llguidance.LLTokenizer, grammar: str) -> str | None:
    """The error of a grammar, if any, as far as it can be found without a model."""
    matcher = compile_grammar(tokenizer, grammar)
    if matcher.is_error():
        return why(matcher)
    return trouble_ahead(matcher, lambda: compile_grammar(tokenizer, grammar))

"""The process that compiles grammars first: one fork each, with limits. llguidance has no limits of time and memory,
and a thread can't be killed, but a process can. This one knows the vocabulary, so that a fork has everything for a
trial. It knows nothing of torch, models or servers.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING

from paged_serving.grammars.compiling import compile_grammar, make_tokenizer, why

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 192 * 2**20  # most memory of a trial besides the vocabulary
_MAX_AT_ONCE = 16  # most trials at once, which share the processor
_QUICK_S = 0.05  # slower trials get a lower priority than new ones
_WALL = 20  # limit of wall time, as a multiple of the limit of processor time


@dataclass(frozen=True)
class _Trial:
    number: int
    pid: int
    slow: float  # time.monotonic(), from when on it steps back
    ends: float  # and when it is ended


def serve(descriptor: int, max_ms: int) -> None:
    """Read ``(number, grammar)`` from the socket ``descriptor`` and answer ``(number, what is wrong or None)``, until
    the other end is closed. First comes the Vocabulary."""
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for our parent; we end with it
    asked = Connection(descriptor)
    try:
        _serve(asked, make_tokenizer(asked.recv()), max_ms)
    except (EOFError, OSError):
        return


def _serve(asked: Connection, tokenizer: llguidance.LLTokenizer, max_ms: int) -> None:
    waiting: deque[tuple[int, str]] = deque()
    running: dict[Connection, _Trial] = {}
    while True:
        while waiting and len(running) < _MAX_AT_ONCE:
            number, grammar = waiting.popleft()
            told, trial = _begin(number, tokenizer, grammar, max_ms, [asked, *running])
            running[told] = trial
        ready = wait([asked, *running], _until_the_next(running.values()))
        for each in [*ready, *(told for told, trial in running.items() if trial.ends <= time.monotonic())]:
            if each is asked:
                waiting.append(asked.recv())
            elif each in running:
                asked.send((running[each].number, _end(each, running.pop(each), max_ms)))


def _until_the_next(trials: Collection[_Trial]) -> float | None:
    """Seconds until the next event of a trial; slow trials get a lower priority."""
    now = time.monotonic()
    for trial in trials:
        if trial.slow <= now:
            os.setpriority(os.PRIO_PROCESS, trial.pid, 19)
    times = [trial.ends if trial.slow <= now else trial.slow for trial in trials]
    return max(0.0, min(times) - now) if times else None


def _begin(
    number: int, tokenizer: llguidance.LLTokenizer, grammar: str, max_ms: int, others: Sequence[Connection]
) -> tuple[Connection, _Trial]:
    told, telling = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            for each in (told, *others):
                each.close()
            _limit(max_ms)
            telling.send(_try(tokenizer, grammar))
        finally:
            os._exit(0)
    telling.close()
    now = time.monotonic()
    return told, _Trial(number, pid, now + _QUICK_S, now + _WALL * max_ms / 1000)


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
    """The error of a grammar, if any, as far as it can be found without an answer's tokens."""
    matcher = compile_grammar(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return why(matcher) if matcher.is_error() else None


def _end(told: Connection, trial: _Trial, max_ms: int) -> str | None:
    """The verdict of a trial that has finished, died, or exceeded its time."""
    try:
        verdict: str | None = told.recv() if told.poll() else _too_long(max_ms)
    except EOFError:
        verdict = f"it takes more than {MAX_BYTES >> 20} MiB"
    told.close()
    os.kill(trial.pid, signal.SIGKILL)
    _, status = os.waitpid(trial.pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return _too_long(max_ms)
    return verdict


def _too_long(max_ms: int) -> str:
    return f"it takes more than {max_ms} ms, this server's limit (--max-grammar-ms)"

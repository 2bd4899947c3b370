"""The process that compiles grammars first: one fork each, with limits. llguidance has no limits of time and memory,
and a thread can't be killed, but a process can. This one knows the vocabulary, so that a fork has everything for a
trial. It knows nothing of torch, models or servers.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Collection
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from paged_serving.grammars.compiling import make_tokenizer
from paged_serving.grammars.trial import Trial

if TYPE_CHECKING:
    import llguidance

_MAX_PAUSED = 15  # most trials beside the one that runs: each may take memory
_QUICK_S = 0.05  # of processor time, which each trial gets before those that take longer


def serve(descriptor: int, max_ms: int) -> None:
    """Read ``(number, grammar)`` from the socket ``descriptor`` and answer ``(number, whether it was tried, what is
    wrong or None)``, until the other end is closed. First comes the Vocabulary."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for our parent; we end with it
    asked = Connection(descriptor)
    try:
        _serve(asked, make_tokenizer(asked.recv()), max_ms)
    except (EOFError, OSError):
        return


def _serve(asked: Connection, tokenizer: llguidance.LLTokenizer, max_ms: int) -> None:
    """One trial runs at a time, so that many take no more of the processors than one. Slow ones are paused for new
    ones; where they are too many, the one paused longest is given up, so that no new one waits for them."""
    waiting: deque[tuple[int, str]] = deque()
    paused: deque[Trial] = deque()
    now: Trial | None = None
    while True:
        next_may_begin = bool(waiting) and (now is None or now.busy_s() >= _QUICK_S)
        if next_may_begin and len(paused) >= _MAX_PAUSED:
            asked.send(paused.pop().end())
        begun = [*paused] if now is None else [now, *paused]
        if next_may_begin:
            if now is not None:
                now.pause()
                paused.appendleft(now)
            now = Trial(*waiting.popleft(), tokenizer, max_ms, [asked, *(each.told for each in begun)])
            begun.append(now)
        elif now is None and paused:
            now = paused.popleft()
            now.go_on()
        ready = wait([asked, *(each.told for each in begun)], _seconds_left(begun, looked_at=bool(waiting)))
        if asked in ready:
            waiting.append(asked.recv())
        for trial in begun:
            if trial.told in ready or trial.ends <= time.monotonic():
                asked.send(trial.end())
                if trial is now:
                    now = None
                else:
                    paused.remove(trial)


def _seconds_left(begun: Collection[Trial], *, looked_at: bool) -> float | None:
    """Until the first of them is given up, or one that others wait for is looked at."""
    if not begun:
        return None
    left = max(0.0, min(trial.ends for trial in begun) - time.monotonic())
    return min(left, _QUICK_S) if looked_at else left

"""EngineCall: what a caller's thread and the engine's thread share for one generate() call."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from paged_core import Engine, Request, RequestOutput


class NotStarted(Exception):
    """The engine can't run a call, and nothing has been done for it yet. ``__cause__`` or the message says why."""


class EngineCall:
    """Rows of one generate() call. ``enter`` and ``take`` run in the engine's thread; ``wait`` in the caller's."""

    def __init__(self, padded: bool) -> None:
        self.padded = padded  # stock would compute padding too
        self.caller: object | None = None  # the open call that owns it; None: no owner that could disappear
        self.engine: Engine | None = None  # the engine that has its rows; for the engine's thread only
        self.rows: list[Request] = []
        self._news: SimpleQueue[Any] = SimpleQueue()

    def enter(self, engine: Engine, name: str) -> list[Request]:
        """Add the rows to the engine, with ids that begin with ``name``."""
        raise NotImplementedError

    def take(self, output: RequestOutput) -> None:
        """The output of one row."""
        raise NotImplementedError

    def leave(self) -> None:
        """The rows have left the engine."""

    def tell(self, news: Any) -> None:
        """Hand something to the caller: what ``wait`` returns, or an exception for it to raise."""
        self._news.put(news)

    def wait(self) -> Any:
        news = self._news.get()
        if isinstance(news, BaseException):
            raise news
        return news


def check_length(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """
    Raises:
        NotStarted: the engine would answer differently from stock, which has none of our limits and errors.
        EngineDeadError: the model has changed.
    """
    longest = max(map(len, prompts)) + max_tokens
    if longest > engine.spec.max_model_len:
        engine.refresh()  # before a request is added, because the limits may be outdated
        raise NotStarted(
            f"prompt and output may have {longest} tokens, but the model knows {engine.spec.max_model_len} positions"
        )


def check_tokens(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """
    Raises:
        NotStarted: a token isn't in the vocabulary; stock raises its own error.
        EngineDeadError: the model has changed.
    """
    if any(not 0 <= token < engine.spec.vocab_size for prompt in prompts for token in prompt):
        engine.refresh()  # as above
        raise NotStarted(f"a prompt holds a token that isn't among the model's {engine.spec.vocab_size}")

"""AsyncEngine: one thread steps the engine; any thread and any event loop can submit, read and cancel.

The engine and its open requests belong to the stepping thread alone (OpenStreams). Other threads reach it through one
queue of commands (EngineThread), and get results through Streams, which have their own locks.

A forked child has a copy of the engine, but not its thread. There the streams of the parent's requests have failed, and
so has the engine, unless its thread never ran; then the child starts its own with the first request.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from paged_core.config import EngineConfig
from paged_core.engine.engine import Engine
from paged_core.engine.openmp import release_helper_threads
from paged_core.frontends.frontend import Frontend
from paged_core.frontends.open_streams import OpenStreams
from paged_core.frontends.stream import Stream
from paged_core.scheduling.params import SamplingParams
from paged_core.text.codec import prepare_params
from paged_core.text.generation import Generation
from paged_core.text.prompts import encode_prompt

__all__ = ["AsyncEngine", "Stream"]

_T = TypeVar("_T")


class AsyncEngine(Frontend):
    """An Engine for servers. Its thread starts with the first request, sleeps when there is nothing to do, and ends
    with ``close()`` (or the ``with`` block).

    Args:
        model: an Engine (don't use it yourself any more), or a model as Engine takes it.
        tokenizer: taken from the model (by the ``load_tokenizer`` hook) when None.
        config: an EngineConfig; or give its fields as keyword arguments.
        max_requests: most open requests, including waiting ones and those being cancelled.
        options: those fields; and ``device``, ``dtype``, ``plugins`` and ``progress``, as Engine takes them.

    Raises:
        TypeError: an option is unknown, or ``model`` is an Engine, which has its options already.
        PluginError, UnsupportedModel, ConfigError: as Engine raises them.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        max_requests: int = 16_384,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, config, options)
        release_helper_threads()  # loading has started some; from now on only the stepping thread computes
        self._numbers = itertools.count()
        self._streams = OpenStreams(self.engine, self.codec, max_requests)

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it has not failed and isn't closed."""
        return self._streams.alive

    @property
    def num_open(self) -> int:
        """Requests whose streams have not ended."""
        return self._streams.num_open

    @property
    def num_commands(self) -> int:
        """The number of commands that its thread has not carried out yet: requests, cancellations, looks."""
        return self._streams.thread.num_commands

    @property
    def busy_s(self) -> float:
        """The seconds that the stepping thread has spent on its present step or command; 0 while it is idle. A step
        that never ends shows here."""
        return self._streams.thread.busy_s

    def submit(self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None) -> Stream:
        """Queue a prompt: a string, token ids or messages. Callable from any thread and inside event loops; the prompt
        is tokenised in the caller's thread.

        Raises:
            InvalidRequestError: the prompt has an unknown form, params are no SamplingParams, or the id is in use.
            Errors that only the engine can find (a prompt that is too long, for example) are raised by the Stream.
            EngineBusyError: ``max_requests`` have not ended yet.
            EngineDeadError: the engine was closed or has failed, or this process was forked from the engine's.
            RuntimeError: its thread can't be started (too many threads); try again later.
        """
        self._streams.check_open()
        arrival = time.perf_counter()
        params = prepare_params(self.codec, params or SamplingParams())
        encoded = encode_prompt(self.codec, prompt)
        if request_id is None:
            request_id = f"request-{next(self._numbers)}"
        channel = self._streams.channel(request_id)
        self._streams.add(Generation(request_id, encoded, params, self.codec, arrival), channel)
        return Stream(channel)

    def look(self, function: Callable[[Engine], _T]) -> Future[_T]:
        """Call ``function(engine)`` in the stepping thread, between two steps; all requests wait for it.

        Raises:
            EngineBusyError: too many looks wait already.
            EngineDeadError: the engine was closed or has failed; the Future raises it if that happens later.
            ReentryError: raised by the Future, if the stepping thread itself would wait for it.
        """
        return self._streams.look(function)

    def close(self, timeout: float | None = None) -> None:
        """Abort all requests (every stream gets its final delta), end the thread, close the engine. May be called
        again.

        Raises:
            TimeoutError: the current step did not end in ``timeout`` seconds; the engine closes when it does.
        """
        if not self._streams.close(timeout):
            raise TimeoutError(f"the engine's step has not ended in {timeout:g} s")

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

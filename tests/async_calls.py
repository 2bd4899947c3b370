"""Helpers to call an AsyncEngine from threads and from event loops, and to read its streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from paged_core import (
    AsyncEngine,
    EngineConfig,
    SamplingParams,
    Stream,
    StreamDelta,
)
from waiting import until

CONFIG = EngineConfig(num_blocks=256, attention_backend="reference")
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
LIMIT_S = 120.0


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 5, **fields})


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, LIMIT_S)

    return asyncio.run(limited())


def in_threads(*works: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not failures, failures


async def collect(stream: Stream) -> list[StreamDelta]:
    return [delta async for delta in stream]


def text_of(deltas: list[StreamDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def until_idle(engine: AsyncEngine) -> None:
    until(lambda: not engine.engine.has_work and engine.num_open == 0)

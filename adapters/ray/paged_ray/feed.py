"""Feed: asks replicas about their prefix caches, periodically while there are requests."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from paged_ray.shared import placement

_PERIOD_S = 1.0  # between two questions to all replicas, which are answered with the changes
_ANSWER_S = 10.0
_log = logging.getLogger("paged_ray")


class Feed:
    """``replicas``: a handle of their deployment."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas
        self._task: asyncio.Task[None] | None = None

    def start(self, block_size: int) -> None:
        """In this event loop, until the process ends."""
        with placement(self._replicas.deployment_id) as known:
            known.block_size = block_size
        if self._task is None:
            self._task = asyncio.ensure_future(self._ask_on_and_on())

    async def _ask_on_and_on(self) -> None:
        num_sent = -1
        while True:
            await asyncio.sleep(_PERIOD_S)
            with placement(self._replicas.deployment_id) as known:
                cursors, sent = dict(known.cursors()), known.num_sent
            if sent != num_sent:  # else at most old blocks were evicted
                num_sent = sent
                await self._ask(cursors)

    async def _ask(self, cursors: dict[Any, int]) -> None:
        try:
            answers = self._replicas.broadcast("changes", cursors)
            told = await answers.results_async(timeout_s=_ANSWER_S, return_exceptions=True)
        except Exception as error:
            _log.warning("replicas could not be asked for what they have cached: %r", error)
            return
        with placement(self._replicas.deployment_id) as known:
            for answer in told:
                if not isinstance(answer, BaseException):  # Ray reports dead replicas in other ways
                    known.take_in(*answer)

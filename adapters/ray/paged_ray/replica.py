"""Replica: one engine behind the HTTP adapter's routes, called through Ray instead of a socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from anyio import EndOfStream, WouldBlock, create_memory_object_stream
from anyio.streams.memory import MemoryObjectSendStream
from ray import serve
from starlette.types import Message

from paged_core import AsyncEngine, Engine
from paged_openai import AppOptions, Service, create_app
from paged_ray.digests import DigestLog
from paged_ray.messages import EngineFacts, RoutedCall
from paged_ray.placement import CacheChanges
from paged_ray.settings import Settings
from paged_serving import PrometheusMetrics, ServedModel, quiet_imports

_log = logging.getLogger("paged_ray")
_LAST_STEP_S = 5.0  # for the step under way when the replica ends
_MAX_UNSENT = 64  # messages of one answer that wait for Ray to take them


class Replica:
    """Ray Serve makes one in each of the application's processes; its methods run in one event loop."""

    def __init__(self, settings: Settings) -> None:
        quiet_imports()
        self.name = serve.get_replica_context().replica_id.unique_id
        self._digests = DigestLog(settings.key)
        self._metrics = PrometheusMetrics(settings.served_names[0], replica=self.name)
        engine = Engine(
            settings.model, settings.engine,
            plugins=[self._metrics, self._digests], device=settings.device, dtype=settings.dtype,
        )  # fmt: skip
        self._engine = AsyncEngine(engine, max_requests=settings.max_ongoing)
        served = ServedModel(self._engine, settings.served_names, settings.limits, strict_fields=settings.strict_fields)
        served.prepare_grammars()
        self._service = Service(
            self._engine, served, max_queue=settings.max_queue, step_timeout_s=settings.step_timeout_s
        )
        self._app = create_app(self._service, self._metrics, AppOptions(api_keys=settings.api_keys, page=False))

    # ---- what the ingress calls --------------------------------------------------------------------------------------

    async def answer(self, call: RoutedCall) -> AsyncIterator[list[Message]]:
        """The ASGI messages of the answer, several at a time if they come faster than they are read."""
        sender, receiver = create_memory_object_stream[Message](_MAX_UNSENT)
        task = asyncio.ensure_future(self._run(call, sender))
        try:
            async with receiver:
                async for message in receiver:
                    messages = [message]
                    with suppress(WouldBlock, EndOfStream):
                        while True:
                            messages.append(receiver.receive_nowait())
                    yield messages
            await task
        finally:
            task.cancel()  # if the client has left, this ends the call and its request

    async def _run(self, call: RoutedCall, sender: MemoryObjectSendStream[Message]) -> None:
        unread = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        async with sender:
            await self._app(dict(call.scope), receive, sender.send)

    def facts(self) -> EngineFacts:
        """The facts that the ingress needs to read requests."""
        engine = self._engine
        return EngineFacts(engine.engine.spec, engine.sizes, engine.config, engine.tokenizer)

    def changes(self, cursors: dict[str, int]) -> tuple[str, CacheChanges]:
        """(its name, what has changed in its prefix cache since the change that ``cursors`` has for it)."""
        return self.name, self._digests.since(cursors.get(self.name, 0))

    def metrics(self) -> bytes:
        """Its metrics in Prometheus' text format, each with its name as ``replica``."""
        return self._metrics.render()[0]

    # ---- what Ray Serve calls ----------------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has failed or is stuck: Ray Serve then puts another in its place."""
        if self._service.trouble is not None:
            raise RuntimeError(self._service.trouble)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            with suppress(Exception):
                engine.close(_LAST_STEP_S)

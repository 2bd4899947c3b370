"""Ingress: takes HTTP requests from Ray Serve's proxies, chooses a replica, and passes on its answer. It runs no model.
It reads the beginning of a request's prompt with the same classes as the replicas. A body that it can't read is passed
on, and the replica answers with the error.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from anyio import CapacityLimiter, to_thread
from ray.exceptions import RayActorError
from starlette.types import Message, Receive, Scope, Send

from paged_openai import error_response, form_of
from paged_ray.exposition import merged
from paged_ray.feed import Feed
from paged_ray.messages import RoutedCall
from paged_ray.prompts import Prompts
from paged_ray.settings import Settings
from paged_ray.shared import placement
from paged_serving import CallError, Failure, event_bytes

_log = logging.getLogger("paged_ray")
_SENT = ("type", "asgi", "http_version", "method", "scheme", "query_string", "headers", "client", "server")
_ATTEMPTS = 3  # of a request whose replica dies before it has sent anything
_MAX_BODY_BYTES = 8 * 2**20
_READERS = 4
_METRICS_S = 10.0  # for all replicas to tell their metrics


class Ingress:
    """``replicas``: a handle of the deployment of Replicas."""

    def __init__(self, replicas: Any, settings: Settings) -> None:
        self._settings = settings
        self._handle = replicas.options(stream=True, method_name="answer")
        self._replicas = replicas
        self._prompts: Prompts | None = None  # until a replica has sent its facts
        self._feed = Feed(replicas)
        self._readers: CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        body = await _read(receive)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if body is None:
            told = f"the body has more than {_MAX_BODY_BYTES} bytes"
            await error_response(form_of(path), CallError(Failure.TOO_LARGE, told))(scope, receive, send)
        elif path == "/metrics" and not self._settings.api_keys:
            await self._send_metrics(send)
        else:
            await self._pass_on(scope, path, body, receive, send)

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def _pass_on(self, scope: Scope, path: str, body: bytes, receive: Receive, send: Send) -> None:
        small = {name: scope[name] for name in _SENT if name in scope} | {"path": path, "root_path": ""}
        digests, num_tokens = await self._digests(path, body)
        started = streams = False
        for attempt in range(_ATTEMPTS):
            call = RoutedCall(uuid.uuid4().hex, digests, num_tokens, small, body)
            try:
                async for message in self._answer(call):
                    streams = streams or _begins_stream(message)
                    started = True
                    await send(message)
                return
            except RayActorError as error:
                _log.warning("a replica died while it answered: %s", error)
                if started and not streams:
                    raise  # an incomplete answer: closing the connection shows it
                if started or attempt + 1 == _ATTEMPTS:
                    await self._tell_of_death(scope, path, started, receive, send)
                    return

    async def _answer(self, call: RoutedCall) -> AsyncIterator[Message]:
        begun, answer = False, self._handle.remote(call)
        try:
            async for messages in answer:
                if not begun:
                    begun = True
                    with placement(self._replicas.deployment_id) as known:
                        known.begun(call.id)
                for message in messages:
                    yield message
        except BaseException:  # the client has left or is unreachable: stop the replica's work too
            answer.cancel()
            raise
        finally:
            with placement(self._replicas.deployment_id) as known:
                known.ended(call.id)

    async def _digests(self, path: str, body: bytes) -> tuple[list[int], int]:
        if self._settings.routing != "prefix" or not body:
            return [], 0
        if self._prompts is None:
            await self._learn()
        if self._prompts is None or not self._prompts.knows(path):
            return [], 0
        self._readers = self._readers or CapacityLimiter(_READERS)
        return await to_thread.run_sync(self._prompts.digests, path, body, limiter=self._readers)

    async def _learn(self) -> None:
        """Get the facts of the model from the first replica that answers; without them, only the load decides."""
        try:
            facts = await self._replicas.facts.remote()
            self._prompts = Prompts(facts, self._settings)
            self._feed.start(self._prompts.block_size)
        except RayActorError:
            return  # another replica will answer
        except Exception:
            _log.exception("prompts can't be read here: requests go where there is least to do")
            self._settings = replace(self._settings, routing="load")

    async def _tell_of_death(self, scope: Scope, path: str, started: bool, receive: Receive, send: Send) -> None:
        form, error = form_of(path), CallError(Failure.CUT, "the replica that computed the answer has died")
        if not started:
            await error_response(form, error)(scope, receive, send)
            return
        event = event_bytes(form.error(error)[1]) + form.last_event
        with suppress(Exception):
            await send({"type": "http.response.body", "body": event, "more_body": False})

    # ---- metrics -----------------------------------------------------------------------------------------------------

    async def _send_metrics(self, send: Send) -> None:
        answers = self._replicas.broadcast("metrics")
        texts = await answers.results_async(timeout_s=_METRICS_S, return_exceptions=True)
        body = merged([text for text in texts if isinstance(text, bytes)])
        headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _begins_stream(message: Message) -> bool:
    return any(b"text/event-stream" in value for _, value in message.get("headers", ()))


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None: it is too large. Ray Serve's proxy limits the time."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY_BYTES:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)

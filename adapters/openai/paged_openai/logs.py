"""One JSON line for each request, and request ids. No prompts and no texts, unless they are in the notes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_openai.counts import RouteCounts
from paged_openai.ignored import ignored_header
from paged_serving import no_progress_bars, quiet_imports

_log = logging.getLogger("paged_openai.requests")
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_QUIET = frozenset({"/health", "/ping", "/ready", "/metrics", "/load", "/live"})  # asked for every few seconds


class RequestLog:
    """ASGI middleware: gives each request its id (the client's ``X-Request-Id`` if it is a sane one), sends it back,
    and logs how the request ended. Other parts add fields in ``scope["notes"]``."""

    def __init__(self, app: ASGIApp, counts: RouteCounts | None = None) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _request_id(scope)
        notes: dict[str, Any] = {}
        scope["request_id"], scope["notes"] = request_id, notes
        status, began = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = [(b"x-request-id", request_id.encode()), *ignored_header(scope)]
                message["headers"] = [*message["headers"], *told]
            await send(message)

        try:
            return await self._app(scope, receive, send_with_id)
        finally:
            quiet, seconds = scope["path"] in _QUIET, time.perf_counter() - began
            if self._counts is not None and status and not quiet:
                self._counts.count(scope, status, seconds)
            level, duration_ms = logging.DEBUG if quiet else logging.INFO, round(seconds * 1000, 1)
            told = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            _log.log(level, "request", extra={"fields": {**told, "duration_ms": duration_ms, **notes}})


class JSONLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _printable(json.dumps(line, ensure_ascii=False, default=str))


def _printable(text: str) -> str:
    """JSON with escapes for everything that would move a terminal's cursor or reverse its text: C1 and other control
    characters, line separators, marks of direction, lone surrogates. Outside strings, JSON has none of them."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def log_to_stderr(level: str) -> None:
    """Our loggers, the core's and uvicorn's, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines())
    for name in ("paged_core", "paged_openai", "paged_serving", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").addFilter(_is_no_cut)
    quiet_imports()
    no_progress_bars()


def _is_no_cut(record: logging.LogRecord) -> bool:
    """Drops uvicorn's error for requests that a second Ctrl-C cancels, which is no fault of the application."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _request_id(scope: Scope) -> str:
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _SANE_ID.fullmatch(given) else uuid.uuid4().hex

"""The path under which a proxy serves us: the routes are the same whether or not the proxy removes it."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # other commands run without Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

_SANE = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_KEY = "prefix"


class PathPrefix:
    """ASGI middleware. ``prefix``: the operator's setting (``/llm``); without it, a proxy's ``X-Forwarded-Prefix`` is
    used. It only affects links."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = self._prefix or _forwarded(scope)
            path = scope["path"]
            if prefix and (path == prefix or path.startswith(f"{prefix}/")):
                scope["path"] = path.removeprefix(prefix) or "/"
            scope[_KEY] = prefix
        await self._app(scope, receive, send)


def prefix_of(scope: Scope) -> str:
    """The prefix of our paths for the client; may be empty."""
    prefix: str = scope.get(_KEY, "")
    return prefix


def checked_prefix(text: str) -> str:
    """For ``add_argument(type=...)``: with a slash before and none behind."""
    prefix = "/" + text.strip("/") if text.strip("/") else ""
    if prefix and not _SANE.fullmatch(prefix):
        raise argparse.ArgumentTypeError(f"{text!r} is no path such as /llm")
    return prefix


def _forwarded(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-forwarded-prefix"), b"")
    prefix = str(given.decode("latin-1")).rstrip("/")
    return prefix if _SANE.fullmatch(prefix) else ""

"""Web pages of other origins: without API keys, such a page must not use a visitor's browser to call a local server.
Browsers hide the answer from the page, but send the call. Other clients send no Origin.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paged_openai.responses import error_response, form_of
from paged_serving import CallError, Failure


class OriginCheck:
    """ASGI middleware: accepts calls of web pages only from our own page and from the named origins."""

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or self._is_welcome(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        told = "pages of other origins may not call this server; --cors-origin names those that may"
        return await error_response(form_of(scope["path"]), CallError(Failure.FORBIDDEN, told))(scope, receive, send)

    def _is_welcome(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return True
        site = headers.get("sec-fetch-site")  # works behind a proxy too, which may use another host name
        return site == "same-origin" if site is not None else _host_of(origin) == headers.get("host")


def _host_of(origin: str) -> str | None:
    """The host with its port. None: it is not a URL."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None

"""Paths that end with a slash: they are the same as without. Knows no routes."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class OptionalSlash:
    """ASGI middleware: takes one slash off the end. (A redirect would send the client to what its Host header says.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1:
            scope["path"] = scope["path"].removesuffix("/")
        await self._app(scope, receive, send)

"""Paths that end with a slash mean the same as without. Knows no routes."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class OptionalSlash:
    """ASGI middleware: removes one slash at the end. (A redirect would send the client to the address in its Host
    header.)"""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1:
            scope["path"] = scope["path"].removesuffix("/")
        await self._app(scope, receive, send)

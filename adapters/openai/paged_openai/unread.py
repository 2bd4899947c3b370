"""Requests that are answered before their bodies have been read: the answer ends the connection. Knows no routes.

What is left of such a body would be taken for the next request's, or be read for nothing.
"""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LINGER_S = 2.0  # in which the client may finish sending: a socket closed over unread bytes takes the answer along


class CloseUnread:
    """ASGI middleware: such an answer says ``Connection: close``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            return await self._app(scope, receive, send)
        read = closing = False

        async def receive_and_note() -> Message:
            nonlocal read
            message = await receive()
            read = read or not message.get("more_body", False)
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal closing
            if message["type"] == "http.response.start" and not read:
                closing = True
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif closing:
                message = {**message, "more_body": True}  # the last word is ours
            await send(message)

        await self._app(scope, receive_and_note, send_and_note)
        if closing:
            with anyio.move_on_after(_LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )

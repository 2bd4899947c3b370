"""Pieces of a body that is streamed: written to the connection itself, once its answer has begun. Knows no routes.

ASGI has a coroutine of every middleware and of the server for each of them, which costs more than the rest of a token
does, and nobody on the way has anything to add. The first and the last message of an answer go that way.
"""

from __future__ import annotations

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_EXTENSION = "paged.pieces"  # of ASGI's scope


class Pieces:
    """Of the answer to the request of one ``scope``. To be made before its task begins, and told its ``cycle`` then."""

    def __init__(self, scope: Scope, flow: FlowControl) -> None:
        self._flow = flow
        self.cycle: RequestResponseCycle | None = None
        scope["extensions"] = {_EXTENSION: self}

    @property
    def ready(self) -> bool:
        """False: not now, it must go ASGI's way, which waits for a client that reads slowly."""
        cycle = self.cycle
        if cycle is None or not cycle.chunked_encoding or cycle.response_complete:
            return False
        return not (self._flow.write_paused or cycle.disconnected)

    def write(self, piece: bytes) -> None:
        """Not an empty one, which would be the end."""
        assert self.cycle is not None, "it is ready"
        self.cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def pieces_of(scope: Scope) -> Pieces | None:
    """What ``scope``'s server has; other servers than ours have ASGI's way only."""
    pieces: Pieces | None = scope.get("extensions", {}).get(_EXTENSION)
    return pieces

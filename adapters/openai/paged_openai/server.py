"""uvicorn, with a shutdown that ends every stream with a last event."""

from __future__ import annotations

import socket
import time
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from paged_openai.connection import Connection, ConnectionLimits
from paged_openai.service import Service

_UNREAD_S = 5.0  # time for slow clients to read the last events


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: stops accepting, lets calls run for ``shutdown_timeout_s``, cuts the rest with a last
    event, and returns. A second signal ends it at once.

    ``keep_alive_s``: for which a connection may stay idle. Longer than clients and proxies keep theirs (httpx 5 s,
    nginx and cloud load balancers 60 s): a request is lost if both ends close at the same time.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        *,
        shutdown_timeout_s: float = 30.0,
        limits: ConnectionLimits | None = None,
        keep_alive_s: int = 75,
        **config: Any,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, limits=limits or ConnectionLimits()),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                proxy_headers=False,
                timeout_keep_alive=keep_alive_s,
                timeout_graceful_shutdown=int(shutdown_timeout_s + _UNREAD_S) + 1,
                **config,
            )
        )
        self._service = service
        self._shutdown_timeout_s = shutdown_timeout_s
        self._told_at = float("inf")  # when the signal came

    @property
    def seconds_left(self) -> float:
        """The rest of ``shutdown_timeout_s`` after all calls have ended; 0 on a second signal."""
        if self.force_exit:
            return 0.0
        return max(0.0, min(self._told_at - time.monotonic(), 0.0) + self._shutdown_timeout_s)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: it raises the signal again at the end, which would kill the process.
        self._told_at = min(self._told_at, time.monotonic())
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain(self._shutdown_timeout_s)
        await super().shutdown(sockets)

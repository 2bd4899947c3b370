"""Ports for servers that have to be told theirs before they start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, closing, suppress

_FROM, _TO = 20_000, 32_000  # below those that systems give to clients: no connection takes one in the meantime


def free_ports(num: int) -> list[int]:
    """So many in a row that nobody listens on."""
    for first in random.Random().sample(range(_FROM, _TO - num), 100):
        ports = list(range(first, first + num))
        with ExitStack() as held, suppress(OSError):
            for port in ports:
                held.enter_context(closing(socket.create_server(("127.0.0.1", port))))
            return ports
    raise AssertionError("there is no free port")

"""Finds free ports for servers that must know their ports before they start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, closing, suppress

_FROM, _TO = 20_000, 32_000  # below the ports that systems give to connections, so that none takes one in the meantime


def free_ports(num: int) -> list[int]:
    """Return so many consecutive ports on which nothing listens."""
    for first in random.Random().sample(range(_FROM, _TO - num), 100):
        ports = list(range(first, first + num))
        with ExitStack() as held, suppress(OSError):
            for port in ports:
                held.enter_context(closing(socket.create_server(("127.0.0.1", port))))
            return ports
    raise AssertionError("there is no free port")

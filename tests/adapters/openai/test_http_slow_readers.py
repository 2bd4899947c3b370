"""Clients that read slowly get all of their answer; those that stop reading lose their place."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from http_calls import LONG
from http_server import LIMIT_S, Running, alphabet_server, until
from paged_openai.connection import ConnectionLimits
from places import TESTS
from raw_http import post, rest_of

PEM = TESTS / "adapters" / "loopback.pem"


@contextmanager
def narrow_server(write_timeout_s: float, model: AlphabetModel | None = None, **tls: Any) -> Iterator[Running]:
    """Its sockets take little that nobody reads."""
    limits = ConnectionLimits(write_timeout_s=write_timeout_s)
    with alphabet_server(model, connections=limits, **tls) as server:
        server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield server


def unread_stream(server: Running) -> socket.socket:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    raw.settimeout(LIMIT_S)
    if server.server.config.is_ssl:
        raw = ssl.create_default_context(cafile=PEM).wrap_socket(raw, server_hostname="127.0.0.1")
    raw.sendall(post({**LONG, "stream": True, "n": 8, "temperature": 1, "logprobs": 2}))
    return raw


@pytest.mark.parametrize("tls", [{}, {"ssl_certfile": PEM}], ids=["plain", "tls"])
def test_a_client_that_stops_reading_loses_its_place(tls: dict[str, Any]) -> None:
    steps: list[object] = []
    with narrow_server(0.5, AlphabetModel(steps.append), **tls) as server, unread_stream(server) as raw:
        until(lambda: steps)
        server.come_to_rest()
        until(lambda: not server.server.server_state.connections)
        assert b"[DONE]" not in rest_of(raw)


def test_a_client_that_reads_slowly_gets_all() -> None:
    with narrow_server(3.0) as server, unread_stream(server) as raw:
        got = b""
        for _ in range(32):  # longer than it may read nothing
            got += raw.recv(1_000)
            time.sleep(0.1)
        while b"[DONE]" not in got[-100:]:
            part = raw.recv(20_000)
            assert part, got[-500:]
            got += part
    assert got.count(b'"finish_reason":"length"') == 8
    texts = [""] * 8
    for told in re.findall(rb"data: (\{.*\})\n\n", got):
        (choice,) = json.loads(told)["choices"]
        texts[choice["index"]] += choice["text"]
    assert len(set(texts)) == 1 and texts[0] in "".join(map(chr, range(32, 128))) * 4, "in their order"

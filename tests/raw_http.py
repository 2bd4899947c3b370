"""HTTP by bare sockets: what no client would send, or read."""

from __future__ import annotations

import json
import socket
from typing import Any

from http_server import LIMIT_S, Running


def post(body: Any, path: str = "/v1/completions", *headers: str) -> bytes:
    content = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + content


def connect(server: Running, data: bytes = b"") -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S)
    raw.sendall(data)
    return raw


def rest_of(raw: socket.socket) -> bytes:
    """Until the server closes."""
    parts = []
    while part := raw.recv(65536):
        parts.append(part)
    return b"".join(parts)


def head_of(raw: socket.socket) -> str:
    data = b""
    while b"\r\n\r\n" not in data:
        part = raw.recv(1)
        assert part, data
        data += part
    return data.decode().lower()

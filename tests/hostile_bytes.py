"""Bytes that no honest client sends: attacks on raw sockets, all from one seed. This file knows HTTP, and our routes by
name."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from http_server import Running

_PATHS = ("/v1/completions", "/v1/chat/completions", "/", "/generate", "/generate_stream", "/tokenize")
Progress = Callable[[int], object]  # called with the number done
_SERVER_ERROR = re.compile(rb"HTTP/1\.1 5\d\d")


def silent(num_done: int) -> None:
    pass


def hostile_bytes(server: Running, num_requests: int, draw_seed: int, progress: Progress = silent) -> Counter[str]:
    """Run attacks side by side. Returns how often each was made.

    Raises:
        AssertionError: an answer was a server error, or pipelined requests were not all answered.
    """
    done: Counter[str] = Counter()

    def one(number: int) -> None:
        rng = random.Random(f"{draw_seed} {number}")
        attack = _ATTACKS[number % len(_ATTACKS)]
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw, suppress(ConnectionError):
            answer = attack(raw, rng)
            assert not _SERVER_ERROR.search(answer), (attack.__name__, answer[:500])
        done[attack.__name__.lstrip("_")] += 1
        progress(done.total())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(num_requests)))
    return done


# ---- attacks: each sends on a socket, and returns what came back -------------------------------------------------


def _truncated(raw: socket.socket, rng: random.Random) -> bytes:
    whole = _post(rng.choice(_PATHS), _honest(rng))
    raw.sendall(whole[: rng.randrange(1, len(whole))])
    if rng.random() < 0.5:
        return b""
    raw.shutdown(socket.SHUT_WR)
    return _read(raw)


def _never_ending(raw: socket.socket, rng: random.Random) -> bytes:
    raw.sendall(_post(rng.choice(_PATHS), _honest(rng), length=rng.choice(["100000", "199999"])))
    return _read(raw)


def _wrong_length(raw: socket.socket, rng: random.Random) -> bytes:
    length = rng.choice(["-1", "abc", "", "9" * 30, "0x10", "5\r\nContent-Length: 6", "1 2", "+3", "0"])
    raw.sendall(_post(rng.choice(_PATHS), _honest(rng), length=length))
    return _read(raw)


def _oversized(raw: socket.socket, rng: random.Random) -> bytes:
    raw.sendall(_post(rng.choice(_PATHS), b'{"inputs": "' + b"A" * rng.choice([199_990, 250_000, 900_000]) + b'"}'))
    return _read(raw)


def _wrong_type(raw: socket.socket, rng: random.Random) -> bytes:
    kind = rng.choice(["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "a/b; charset=utf-16",
                       "\xff", "", ";;;", "application/json; charset=ebcdic"])  # fmt: skip
    body = rng.choice([_honest(rng), b"inputs=A", b"--x\r\n\r\nA\r\n--x--", _honest(rng).decode().encode("utf-16")])
    raw.sendall(_post(rng.choice(_PATHS), body, headers=f"Content-Type: {kind}\r\n"))
    return _read(raw)


def _hostile_json(raw: socket.socket, rng: random.Random) -> bytes:
    depth = rng.choice([100, 5_000, 60_000])
    value = rng.choice([
        b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"1e999", b"-1e999", b"9" * 5000, b"NaN",
        b"-Infinity", b'"\\ud800"', b'"\xff\xfe"', b'"\\u0000"', b"1e-400", b"-0", b"1" + b"0" * 400, b'"\xed\xa0\x80"',
        b"tru", b"'A'", b'"A', b"[1,]", b"0x10", b'"' + b"\xf0\x9f\x98\x80" * 1000 + b'"',
    ])  # fmt: skip
    name = rng.choice([b"inputs", b"prompt", b"messages", b"max_tokens", b"temperature", b"logit_bias", b"parameters",
                       b"stop", b"seed", b"n", b"response_format", b"guided_json"])  # fmt: skip
    body = rng.choice([value, b'{"' + name + b'": ' + value + b"}", b"\xef\xbb\xbf" + value,
                       b'{"inputs": "A", "prompt": "A", "' + name + b'": ' + value + b"}",
                       b'{"inputs": "A", "parameters": {"' + name + b'": ' + value + b"}}"])  # fmt: skip
    raw.sendall(_post(rng.choice(_PATHS), body))
    return _read(raw)


def _slow(raw: socket.socket, rng: random.Random) -> bytes:
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in _post(rng.choice(_PATHS), _honest(rng), close=True):
        raw.send(bytes([byte]))
        time.sleep(rng.random() * 0.002)
    return _read(raw)


def _leaves_a_stream(raw: socket.socket, rng: random.Random) -> bytes:
    raw.sendall(
        _post("/v1/completions", json.dumps({"prompt": "!", "stream": True, "max_tokens": 40, "n": 2}).encode())
    )
    answer = raw.recv(rng.choice([1, 100, 1000]))
    if rng.random() < 0.5:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
    return answer


def _leaves_at_once(raw: socket.socket, rng: random.Random) -> bytes:
    raw.sendall(_post(rng.choice(_PATHS), _honest(rng)))
    return b""


def _headers(raw: socket.socket, rng: random.Random) -> bytes:
    abuse = rng.choice([
        "A: " + "a" * 300_000 + "\r\n", "A: b\r\n" * 3000, "A\0: b\r\n", "A : b\r\n", "A: b\r\n c\r\n", ": b\r\n",
        "Authorization: Bearer " + "x" * 5000 + "\r\n", "X-Request-Id: \xff\r\n", "Expect: 100-continue\r\n",
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAAA\r\n",
        "Transfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip, chunked\r\n", "Content-Encoding: gzip\r\n",
        "Host: y\r\n", "Range: bytes=0-1\r\n", "Cookie: " + "a=b; " * 1000 + "\r\n", "Accept: x/nothing\r\n",
    ])  # fmt: skip
    raw.sendall(_post(rng.choice(_PATHS), _honest(rng), headers=abuse))
    return _read(raw)


def _request_line(raw: socket.socket, rng: random.Random) -> bytes:
    line = rng.choice([
        "GET", "GET / HTTP/9.9", "FOO / HTTP/1.1", "GET /%00%ff HTTP/1.1", "GET /../../etc/passwd HTTP/1.1",
        "GET http://x/ HTTP/1.1", "OPTIONS * HTTP/1.1", "GET /" + "a" * 100_000 + " HTTP/1.1", "\x16\x03\x01\x02",
        "PRI * HTTP/2.0", "POST /generate HTTP/1.0", "CONNECT x:80 HTTP/1.1", "TRACE / HTTP/1.1", "HEAD /info HTTP/1.1",
        "GET /v1/models/%2e%2e%2f HTTP/1.1", "GET /v1/models/ HTTP/1.1", "GET /info?" + "a=b&" * 5000 + " HTTP/1.1",
        "POST //generate HTTP/1.1", "POST /generate/ HTTP/1.1", "DELETE /v1/models/alphabet HTTP/1.1", " / HTTP/1.1",
    ])  # fmt: skip
    raw.sendall(line.encode("latin-1") + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
    return _read(raw)


def _chunks(raw: socket.socket, rng: random.Random) -> bytes:
    raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    raw.sendall(rng.choice([
        b"zz\r\n", b"-1\r\n", b"ffffffffffffffffff\r\nA", b"e\r\n" + b'{"inputs":"A"}' + b"\r\n0\r\n\r\n",
        b"5\r\nhello", b"1\r\n{\r\n" * 2000, b"0\r\nEvil: trailer\r\n\r\n", b"0\r\n\r\nGET /info HTTP/1.1\r\n\r\n",
        b"1;" + b"x" * 70_000,
    ]))  # fmt: skip
    return _read(raw)


def _pipelined(raw: socket.socket, rng: random.Random) -> bytes:
    body = json.dumps({"prompt": "A", "max_tokens": 3, "temperature": 0, "stream": rng.random() < 0.5}).encode()
    num = rng.randrange(2, 6)
    raw.sendall(_post("/v1/completions", body) * (num - 1) + _post("/v1/completions", body, close=True))
    answer = _read(raw, patience_s=30)
    assert answer.count(b"HTTP/1.1 200") == num, answer[-500:]
    return answer


def _pipelined_and_left(raw: socket.socket, rng: random.Random) -> bytes:
    raw.sendall(_post(rng.choice(_PATHS), _honest(rng)) * 20)
    return raw.recv(rng.choice([1, 1000]))


_ATTACKS: tuple[Callable[[socket.socket, random.Random], bytes], ...] = (
    _truncated, _never_ending, _wrong_length, _oversized, _wrong_type, _hostile_json, _hostile_json, _hostile_json,
    _slow, _leaves_a_stream, _leaves_at_once, _headers, _headers, _request_line, _request_line, _chunks, _pipelined,
    _pipelined_and_left,
)  # fmt: skip


def _honest(rng: random.Random) -> bytes:
    return rng.choice([
        b'{"inputs": "A"}', b'{"prompt": "A"}', b'{"messages": [{"role": "user", "content": "A"}]}',
        b'{"prompt": "A", "stream": true}', b'{"inputs": "A", "stream": true}',
    ])  # fmt: skip


def _post(path: str, body: bytes, *, length: str | None = None, headers: str = "", close: bool = False) -> bytes:
    length = str(len(body)) if length is None else length
    headers += "Connection: close\r\n" if close else ""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n"
    return head.encode("latin-1") + body


def _read(raw: socket.socket, patience_s: float = 0.15) -> bytes:
    """Return what comes until the end, or until nothing comes for a while."""
    raw.settimeout(patience_s)
    parts = []
    with suppress(TimeoutError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)

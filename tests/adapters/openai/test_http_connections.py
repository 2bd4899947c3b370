"""Clients that send or read as no honest one does: each costs little, for a while, and nobody else anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from alphabet_model import AlphabetModel, Gate
from http_calls import LONG
from http_server import LIMIT_S, Running, alphabet_server, until
from paged_core import EngineConfig
from paged_openai.app import AppOptions
from paged_openai.connection import ConnectionLimits
from raw_http import connect, head_of, post, rest_of

# ---- idle connections ------------------------------------------------------------------------------------------


def test_an_idle_connection_outlives_the_pools_of_clients_and_no_longer_than_was_said() -> None:
    with alphabet_server(keep_alive_s=1, connections=ConnectionLimits(head_timeout_s=0.2)) as server:
        with connect(
            server, post({"prompt": "A", "max_tokens": 1}, "/v1/completions", "Connection: keep-alive")
        ) as raw:
            began = time.monotonic()
            assert rest_of(raw).startswith(b"HTTP/1.1 200")
            assert time.monotonic() - began > 0.9, "the time for a head is no limit for idleness"
        with connect(server, post({"prompt": "A", "max_tokens": 1})) as raw:
            assert "200 ok" in head_of(raw)
            raw.sendall(b"POST /v1/")
            assert b"408" in rest_of(raw), "a head that has begun has its own limit"
    with alphabet_server() as server:
        assert server.server.config.timeout_keep_alive == 75


# ---- heads and bodies that don't come ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    limits = ConnectionLimits(max_head_bytes=8000, max_connections=10, max_ahead_bytes=2000)
    with alphabet_server(connections=limits, options=AppOptions(api_keys=("key",), max_body_bytes=2000)) as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with alphabet_server(connections=ConnectionLimits(head_timeout_s=1.0)) as server:
        yield server


@pytest.mark.parametrize("data", [b"", b"POST /generate HTTP/1.1\r\nHost: x\r\n", b"\r\n"])
def test_headers_are_not_waited_for_forever(hasty: Running, data: bytes) -> None:
    with connect(hasty, data) as raw:
        answer = rest_of(raw)
    assert answer == b"" if not data else answer.startswith(b"HTTP/1.1 408 ")


def test_headers_that_trickle_in_are_not_waited_for_forever(hasty: Running) -> None:
    with connect(hasty, b"GET /health HTTP/1.1\r\n") as raw, suppress(ConnectionError):
        raw.setblocking(False)
        deadline = time.monotonic() + LIMIT_S
        answer = b""
        while b"408" not in answer:
            assert time.monotonic() < deadline
            raw.send(b"A")
            time.sleep(0.02)
            with suppress(BlockingIOError):
                answer += raw.recv(1000)


def test_a_connection_that_was_used_is_bounded_as_well(hasty: Running) -> None:
    with connect(hasty, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as raw:
        assert "200 ok" in head_of(raw)
        raw.sendall(b"GET")
        assert rest_of(raw).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("head", [b"A: " + b"a" * 20_000, b"A: b\r\n" * 2000, b"A: " + b"a" * 1_000_000])
def test_headers_have_a_size(strict: Running, head: bytes) -> None:
    with connect(strict) as raw:
        with suppress(ConnectionError):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert rest_of(raw).startswith(b"HTTP/1.1 431 ")


def test_connections_have_a_number_and_those_beyond_are_told_to_come_back(strict: Running) -> None:
    until(lambda: not strict.server.server_state.connections)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(connect(strict, post(LONG, "/generate", "Authorization: Bearer key")[:-5]))
        until(lambda: len(strict.server.server_state.connections) == 10)
        with connect(strict, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as raw:
            answer = rest_of(raw).lower()
            assert answer.startswith(b"http/1.1 503 ") and b"retry-after: 1" in answer
    until(lambda: not strict.server.server_state.connections)
    with strict.client() as client:
        assert client.get("/health").status_code == 200


def test_a_client_is_served_while_others_hold_back_what_they_send(strict: Running) -> None:
    with ExitStack() as stack:
        for data in (b"", b"GET / HT", post(LONG, "/generate", "Authorization: Bearer key")[:-1]) * 2:
            stack.enter_context(connect(strict, data))
        with strict.client(headers={"Authorization": "Bearer key"}) as client:
            assert client.post("/generate", json={"inputs": "A"}).status_code == 200


# ---- bodies that nobody reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", 401),
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 401),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 3000\r\n\r\n"
         + b" " * 2500, 413),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n", 200),
    ],
)  # fmt: skip
def test_an_answer_to_a_request_whose_body_was_not_read_ends_the_connection(
    strict: Running, data: bytes, status: int
) -> None:
    with connect(strict, data) as raw:
        head = head_of(raw)
        assert head.startswith(f"http/1.1 {status} ") and "connection: close" in head
        raw.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
        assert rest_of(raw).count(b"HTTP/1.1") == 0, "what follows is taken for no request"


def test_a_client_that_sends_all_of_a_refused_body_before_it_reads_gets_the_answer() -> None:
    body = b" " * 20_000_000  # more than sockets hold
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with alphabet_server(options=AppOptions(max_body_bytes=1000)) as server, connect(server, head + body) as raw:
        assert head_of(raw).startswith("http/1.1 413 ")


def test_a_body_that_was_read_leaves_the_connection_open(strict: Running) -> None:
    with connect(strict, post({"inputs": 1}, "/generate", "Authorization: Bearer key")) as raw:
        head = head_of(raw)
        assert head.startswith("http/1.1 422 ") and "connection: close" not in head


# ---- requests sent ahead -------------------------------------------------------------------------------------------


def test_requests_that_are_sent_ahead_are_answered_in_their_order() -> None:
    with alphabet_server() as server:
        data = b"".join(post({"inputs": letter}, "/generate") for letter in "ABCDE")
        with connect(server, data[:-1]) as raw:
            raw.sendall(data[-1:])
            texts: list[str] = []
            answer = b""
            while len(texts) < 5:
                answer += raw.recv(65536)
                texts = [part.split(b'"')[0].decode()[:1] for part in answer.split(b'"generated_text":"')[1:]]
    assert texts == list("BCDEF")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_leaves_is_noticed_whatever_it_has_sent_ahead(gate: Gate, at_once: bool) -> None:
    with alphabet_server(AlphabetModel(gate)) as server:
        gate.shut()
        ahead = post({**LONG, "stream": True}) * 3
        with connect(server, post({**LONG, "stream": True}) + (ahead if at_once else b"")) as raw:
            until(lambda: gate.num_steps > 0)
            if not at_once:
                raw.sendall(ahead)
                until(lambda: any(each.pipeline for each in list(server.server.server_state.connections)))
        server.wait_until_told_to_cancel()
        gate.open()
        server.come_to_rest()
        assert gate.num_steps < 150, "200 tokens would have taken as many steps, four times"


def test_who_sends_too_much_ahead_gets_the_answer_under_way_and_no_more(strict: Running) -> None:
    key = "Authorization: Bearer key"
    body = {**LONG, "max_tokens": 3, "stream": True}
    with connect(strict, post(body, "/v1/completions", key) * 200) as raw:
        answer = rest_of(raw)
    assert 1 <= answer.count(b"[DONE]") < 100
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"[DONE]"), "none is broken off"


def test_nonsense_sent_ahead_doesnt_break_into_the_answer_under_way(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate)) as server:
        gate.shut()
        with connect(server, post({**LONG, "max_tokens": 5, "stream": True})) as raw:
            until(lambda: gate.num_steps > 0)
            raw.sendall(b"\0nonsense\r\n\r\n")
            until(lambda: any(each.deaf for each in list(server.server.server_state.connections)))
            gate.open()
            answer = rest_of(raw)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"0\r\n\r\n") and b"[DONE]" in answer


# ---- before a request is a call ------------------------------------------------------------------------------------


def test_requests_whose_bodies_are_on_their_way_count() -> None:
    config = EngineConfig(num_blocks=512, max_num_seqs=2, attention_backend="reference")
    options = AppOptions(body_timeout_s=30)
    with ExitStack() as stack, alphabet_server(config=config, max_queue=1, options=options) as server:
        data = [post({"inputs": "A"}, path) for path in ("/generate", "/tokenize", "/v1/completions")]
        raws = [stack.enter_context(connect(server, each[:-1])) for each in data]
        until(lambda: server.service.num_open == 3)
        with server.client() as client:
            refused = client.post("/v1/completions", json={"prompt": "A"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert client.post("/tokenize", json={"inputs": "A"}).status_code == 429
            for raw, each in zip(raws, data, strict=True):
                raw.sendall(each[-1:])
                head_of(raw)
                raw.close()
            assert client.post("/tokenize", json={"inputs": "A"}).status_code == 200
        server.come_to_rest()


def test_large_bodies_that_come_at_once_are_bounded_together() -> None:
    options = AppOptions(max_body_bytes=100_000, body_timeout_s=30)
    with alphabet_server(options=options, service_options={"max_unread_bytes": 150_000}) as server:
        large = post({"inputs": "A" * 90_000}, "/tokenize")
        with connect(server, large[:-1]) as raw, server.client() as client:
            until(lambda: server.service.num_unread_bytes > 80_000)
            assert client.post("/tokenize", content=b" " * 90_000).status_code == 429
            assert client.post("/tokenize", json={"inputs": "A"}).status_code == 200
            raw.sendall(large[-1:])
            head_of(raw)
        server.come_to_rest()
        assert server.service.num_unread_bytes == 0


def test_streams_go_on_while_a_large_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, done = threading.Event(), threading.Event()

    def slowly(*_: Any) -> list[Any]:
        reading.set()
        assert done.wait(LIMIT_S)
        return []

    monkeypatch.setattr("paged_openai.app.tokenize", slowly)
    with alphabet_server() as server, connect(server, post({"inputs": "A"}, "/tokenize")) as raw:
        assert reading.wait(LIMIT_S)
        with server.client() as client:
            assert client.post("/v1/completions", json={**LONG, "max_tokens": 5, "stream": True}).status_code == 200
        done.set()
        assert "200 ok" in head_of(raw)

"""Bodies over HTTP: limits, mistakes and hostile bytes are told in the form of their side, and the server goes on."""

from __future__ import annotations

import socket
from contextlib import suppress

import httpx2
import pytest

from http_calls import events
from http_server import LIMIT_S, alphabet_server
from paged_openai.app import AppOptions
from paged_serving import RequestLimits


def test_limits_are_told_by_name(friend: httpx2.Client) -> None:
    for fields, param in (
        ({"prompt": "A" * 21}, "prompt"),
        ({"prompt": "A", "max_tokens": 51}, "max_tokens"),
        ({"prompt": "A", "n": 3}, "n"),
    ):
        refused = friend.post("/v1/completions", json=fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_penalty_that_would_make_numbers_overflow_is_refused_as_the_callers() -> None:
    with alphabet_server() as server, server.client() as client:
        for value in (0, 2e-38):
            refused = client.post("/v1/completions", json={"prompt": "A", "repetition_penalty": value})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "repetition_penalty"), refused.text
        assert client.post("/v1/completions", json={"prompt": "A", "repetition_penalty": 1e-6}).status_code == 200


def test_an_answer_whose_length_nobody_asks_for_keeps_the_servers_limit() -> None:
    with alphabet_server(limits=RequestLimits(max_tokens=7)) as server, server.client() as client:
        plain = client.post("/v1/completions", json={"prompt": "!", "temperature": 0}).json()
        assert (plain["choices"][0]["text"], plain["choices"][0]["finish_reason"]) == ("\"#$%&'(", "length")
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "!"}]}).json()
        assert chat["usage"]["completion_tokens"] == 7
        assert client.post("/generate", json={"inputs": "!"}).json()["generated_text"] == "\"#$%&'("


def test_a_method_that_is_not_for_a_route_is_told_which_are(friend: httpx2.Client) -> None:
    refused = friend.get("/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert set(friend.delete("/info").headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_models_are_listed_with_a_slash_at_the_end_too(friend: httpx2.Client) -> None:
    assert friend.get("/v1/models/").json() == friend.get("/v1/models").json()


def test_a_body_that_is_too_large_is_refused_however_it_comes(friend: httpx2.Client) -> None:
    assert friend.post("/generate", content=b" " * 2001).status_code == 413
    refused = friend.post("/v1/completions", content=(b" " * 100 for _ in range(21)))
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_body_that_never_comes_is_not_waited_for() -> None:
    with (
        alphabet_server(options=AppOptions(body_timeout_s=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) as raw,
    ):
        raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"prompt": NaN}', b"[" * 1900])
def test_a_malformed_body_is_the_callers_mistake(friend: httpx2.Client, content: bytes) -> None:
    assert friend.post("/v1/completions", content=content).status_code == 400
    assert friend.post("/generate", content=content).status_code == 422


HOSTILE = [
    b"",
    b"\x16\x03\x01\x02\x00\x01",  # TLS to a server that speaks none
    b"GET",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n" + b'{"inputs": "A"',
    b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\x00\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /%00%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"a" * 300_000 + b"\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n" + b'{"inputs": "A"}' * 3,
]


def test_hostile_bytes_leave_a_server_that_answers() -> None:
    with alphabet_server() as server:
        for data in HOSTILE:
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.settimeout(0.3)
                with suppress(OSError):
                    raw.sendall(data)
                    raw.recv(1000)
        with server.client() as client:
            assert client.post("/generate", json={"inputs": "A"}).status_code == 200
        server.come_to_rest()


def test_unknown_paths_and_methods_are_told_in_the_form_of_their_side(friend: httpx2.Client) -> None:
    assert friend.post("/v1/embeddings").json()["error"]["type"] == "not_found_error"
    assert friend.post("/elsewhere").json()["error_type"] == "not_found"
    assert friend.get("/v1/completions").status_code == 405


def test_chats_stream_as_tgis_client_reads_them_where_it_was_asked_for(friend: httpx2.Client) -> None:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 3}
    deltas = [event["choices"][0]["delta"] for event in events(friend.post("/v1/chat/completions", json=body).text)]
    assert [delta["role"] for delta in deltas] == ["assistant"] * len(deltas)
    assert all(delta["tool_calls"] is None for delta in deltas)
    assert "".join(delta["content"] for delta in deltas) == ";<="


def test_streams_end_with_done_elsewhere() -> None:
    with alphabet_server() as server, server.client() as client:
        response = client.post("/v1/completions", json={"prompt": "A", "stream": True, "max_tokens": 3})
        assert events(response.text)[-1] == "[DONE]"

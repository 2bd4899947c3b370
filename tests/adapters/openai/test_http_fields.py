"""Fields that nobody knows: left out, named in the answer's header, told once in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from http_server import Running, alphabet_server
from paged_openai.ignored import IgnoredFields, ignored_header

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
BODIES = {
    "/v1/completions": {"prompt": "A", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/generate": {"inputs": "A"},
    "/tokenize": {"inputs": "A"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with alphabet_server() as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("path", BODIES)
def test_every_route_leaves_them_out_and_names_them(client: httpx2.Client, path: str) -> None:
    response = client.post(path, json={**BODIES[path], "colour": "red", "nothing": None})
    assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "colour")
    assert "x-ignored-fields" not in client.post(path, json=BODIES[path]).headers


def test_streams_and_errors_name_them_too(client: httpx2.Client) -> None:
    messages = [{"role": "user", "content": "Hi", "id": number, "timestamp": 1} for number in range(3)]
    for more, status in (({"stream": True}, 200), ({"temperature": -1}, 400)):
        response = client.post("/v1/chat/completions", json={**CHAT, "messages": messages, "tone": 1, **more})
        assert response.status_code == status
        assert response.headers["x-ignored-fields"] == "messages[].id, messages[].timestamp, tone"


def test_names_are_the_clients_words_and_can_break_no_header(client: httpx2.Client) -> None:
    names = ["a\r\nset-cookie: x=1", "b, c", "ü" * 100, "\x00", ""]
    response = client.post("/v1/completions", json={"prompt": "A", "max_tokens": 1, **dict.fromkeys(names, 1)})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    told = response.headers["x-ignored-fields"].split(", ")
    assert told[:2] == ["a\\u000d\\u000aset-cookie:\\u0020x=1", "b\\u002c\\u0020c"]
    many = client.post("/v1/completions", json={"prompt": "A", "max_tokens": 1} | {f"f{n}": n for n in range(5000)})
    assert many.status_code == 200
    assert many.headers["x-ignored-fields"].endswith("f15, ...")


def test_the_log_tells_each_once_and_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "paged_openai")
    ignored = IgnoredFields()
    scope: dict[str, Any] = {"path": "/x"}
    for names in (["a"], ["a", "b"], [], ["a", "b"], *([f"n{number}"] for number in range(1000))):
        ignored.note(scope, names)
    told = [record.fields["ignored_fields"] for record in caplog.records]  # type: ignore[attr-defined]
    assert told[:2] == [["a"], ["b"]]
    assert len(told) <= 256, "names are the clients' own"
    assert ignored_header(scope) == [(b"x-ignored-fields", b"n999")]

"""Fields that nobody knows: left out, named in the answer's header, told once in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from http_server import Running, alphabet_server
from paged_openai.ignored import IgnoredFields, ignored_header

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
BODIES = {
    "/v1/completions": {"prompt": "A", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "A", "max_output_tokens": 2},
    "/v1/messages": {"messages": CHAT["messages"], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
    "/generate": {"inputs": "A"},
    "/detokenize": {"tokens": [33]},
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


NOTHING: dict[str, list[dict[str, Any]]] = {  # fields that ask for what is done anyway
    "/v1/completions": [
        {"temperature": 0, "top_p": 0}, {"n": 1, "best_of": 1, "suffix": ""}, {"use_beam_search": False},
        {"request_id": "x", "return_tokens_as_token_ids": False, "add_special_tokens": True, "logits_processors": []},
    ],
    "/v1/chat/completions": [
        {"temperature": 0, "top_p": 0}, {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"reasoning_effort": "none", "functions": [], "function_call": "none"}, {"modalities": ["text"]},
        {"response_format": {"type": "text"}, "store": False, "request_id": "x", "return_tokens_as_token_ids": False},
    ],
    "/v1/responses": [
        {"temperature": 0, "top_p": 0}, {"tools": [], "tool_choice": "none"}, {"reasoning": {"effort": "none"}},
        {"truncation": "disabled", "background": False, "top_logprobs": 0, "include": []},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
    ],
    "/v1/messages": [
        {"temperature": 0, "top_p": 0}, {"tools": [], "tool_choice": {"type": "none"}}, {"mcp_servers": []},
        {"thinking": {"type": "disabled"}, "stop_sequences": []},
    ],
    "/generate": [{"parameters": {"watermark": False, "typical_p": 1.0, "adapter_id": None, "stop": []}}],
}  # fmt: skip


SAID: dict[str, Callable[[Any], str]] = {
    "/v1/completions": lambda answer: answer["choices"][0]["text"],
    "/v1/chat/completions": lambda answer: answer["choices"][0]["message"]["content"],
    "/v1/responses": lambda answer: answer["output"][0]["content"][0]["text"],
    "/v1/messages": lambda answer: answer["content"][0]["text"],
    "/generate": lambda answer: answer["generated_text"],
}


@pytest.mark.parametrize("path", NOTHING)
def test_fields_that_ask_for_nothing_change_nothing_and_are_not_told_of(client: httpx2.Client, path: str) -> None:
    greedy = {} if path == "/generate" else {"temperature": 0}
    plain = SAID[path](client.post(path, json={**BODIES[path], **greedy}).json())
    for fields in NOTHING[path]:
        answer = client.post(path, json={**BODIES[path], **greedy, **fields})
        assert (answer.status_code, answer.headers.get("x-ignored-fields")) == (200, None), (fields, answer.text)
        assert SAID[path](answer.json()) == plain, fields


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

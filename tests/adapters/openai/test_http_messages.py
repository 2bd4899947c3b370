"""/v1/messages, as Anthropic's SDK uses it, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import httpx2
import pytest

from http_server import Running, alphabet_server
from paged_openai.app import AppOptions

HI: Any = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with alphabet_server(options=AppOptions(api_keys=("key",))) as running:
        yield running


@pytest.fixture(scope="module")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def raw(server: Running) -> Iterator[httpx2.Client]:
    with server.client(headers={"x-api-key": "key"}) as client:
        yield client


def test_a_message_has_anthropics_shape(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="alphabet", messages=HI, max_tokens=4, system="Spell.")
    (block,) = answer.content
    assert block.type == "text" and block.text == ";<=>"
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("max_tokens", None, "assistant")
    assert answer.usage.output_tokens == 4
    stopped = claude.messages.create(model="alphabet", messages=HI, max_tokens=9, stop_sequences=[">"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ">")


def test_a_messages_events_join_to_the_plain_answer(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "alphabet", "messages": HI, "max_tokens": 4}
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        joined = stream.get_final_message()
    plain = claude.messages.create(**asked)
    assert text == ";<=>"
    assert [block.model_dump(include={"type", "text"}) for block in joined.content] == [
        block.model_dump(include={"type", "text"}) for block in plain.content
    ]
    assert (joined.stop_reason, joined.usage.output_tokens) == (plain.stop_reason, plain.usage.output_tokens)


def test_tokens_are_counted_as_they_are_asked(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model="alphabet", messages=HI, system="Spell.")
    answer = claude.messages.create(model="alphabet", messages=HI, max_tokens=1, system="Spell.")
    asked = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == asked


def test_errors_are_anthropics(claude: anthropic.Anthropic, server: Running, raw: httpx2.Client) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="alphabet", messages=HI, max_tokens=0)
    with pytest.raises(anthropic.NotFoundError, match="not served"):
        claude.messages.create(model="claude-9", messages=HI, max_tokens=1)
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model="alphabet", messages=HI, max_tokens=1)
    refused = raw.post("/v1/messages", json={"messages": []})
    assert refused.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": refused.json()["error"]["message"]},
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)
def test_what_a_message_cannot_have_is_refused_by_name(raw: httpx2.Client, fields: dict[str, Any], named: str) -> None:
    refused = raw.post("/v1/messages", json={"messages": HI, "max_tokens": 2, **fields})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert named in refused.json()["error"]["message"]


def test_a_full_queue_is_told_as_each_side_knows_it() -> None:
    with alphabet_server() as server, server.client() as client, ExitStack() as arriving:
        for _ in range(server.service.max_open):
            arriving.enter_context(server.service.arrival())
        told = client.post("/v1/messages", json={"messages": HI, "max_tokens": 1})
        assert (told.status_code, told.json()["error"]["type"]) == (529, "overloaded_error")
        assert client.post("/v1/responses", json={"input": "Hi"}).status_code == 503

"""/openapi.json says what there is: every route, and every field that a body may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from jsonschema_rs import Draft202012Validator

from http_server import Running, alphabet_server
from paged_openai.app import AppOptions
from places import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BODIES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/",
    "/generate",
    "/generate_stream",
    "/tokenize",
    "/detokenize",
)
LEAST = {
    "prompt": "A",
    "messages": [{"role": "user", "content": "A"}],
    "inputs": "A",
    "tokens": [33],
    "input": "A",
    "max_tokens": 2,
}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx2.Client) -> Any:
    return client.get("/openapi.json").json()


def body_of(document: Any, path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_every_route_stands_in_the_document(server: Running, document: Any) -> None:
    routes = [route for route in server.server.config.app.routes if route.include_in_schema]
    there = {(route.path.replace(":path", ""), method) for route in routes for method in route.methods - {"HEAD"}}
    assert there == {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    posts = {path for path, methods in document["paths"].items() if "post" in methods} - {"/ping"}  # it has no body
    assert posts == set(BODIES)
    for path in posts:
        Draft202012Validator(body_of(document, path))


@pytest.mark.parametrize("path", BODIES)
def test_every_field_of_the_document_is_known_and_its_shape_is_held(
    client: httpx2.Client, document: Any, path: str
) -> None:
    schema = body_of(document, path)
    fields = schema["properties"]
    least = {name: LEAST[name] for name in schema.get("required", ["inputs"])}
    assert client.post(path, json=least).status_code == 200
    for name, shape in fields.items():
        wrong = [
            value for value in ({"\0": 1}, "\0", -1e12, True, [{}]) if not Draft202012Validator(shape).is_valid(value)
        ]
        for value in wrong:
            refused = client.post(path, json={**least, name: value})
            assert refused.status_code in (400, 422), (name, value)
            assert name in refused.text
            assert f"{name} is not a field that this server knows" not in refused.text
    for value in (1, None):
        surprised = {**least, "surprise": value}
        assert Draft202012Validator(schema).is_valid(surprised)
        assert client.post(path, json=surprised).status_code == 200


def test_the_fields_are_those_that_the_manual_lists(document: Any) -> None:
    said = PAGE.split("## What a request may hold")[1].split("\n## ")[0]
    fields = set()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate"):
        for name, shape in body_of(document, path)["properties"].items():
            fields |= {name, *shape.get("properties", {})} if name in ("parameters", "stream_options") else {name}
    missing = {name for name in fields if f"`{name}`" not in said}
    assert missing <= {
        # the manual says "all that belongs to them", "sound", "unless the value asks for nothing"
        "functions", "tool_choice", "function_call", "audio", "modalities", "prediction", "web_search_options",
        "moderation", "spaces_between_special_tokens", "include_obfuscation", "parameters", "documents",
    }  # fmt: skip
    assert {"temperature", "max_new_tokens", "include_usage", "logit_bias", "top_logprobs"} <= fields


def test_bounds_and_defaults_are_those_of_the_reader(document: Any) -> None:
    fields = body_of(document, "/v1/chat/completions")["properties"]
    assert fields["top_p"] == {"type": ["number", "null"], "minimum": 0, "maximum": 1, "default": 1.0}
    assert fields["n"]["minimum"] == 1
    assert body_of(document, "/v1/completions")["properties"]["max_tokens"]["minimum"] == 0  # with echo
    message = fields["messages"]["items"]
    assert message["required"] == ["role"]
    assert body_of(document, "/generate")["properties"]["parameters"]["properties"]["max_new_tokens"]["default"] == 100
    one_of = [{"required": [name]} for name in ("inputs", "prompt", "messages")]
    assert body_of(document, "/tokenize")["anyOf"] == one_of


def test_a_server_that_is_strict_about_fields_says_so() -> None:
    with alphabet_server(strict_fields=True) as server, server.client() as client:
        document = client.get("/openapi.json").json()
        for value, taken in ((1, False), (None, True)):
            for surprised in (
                {"messages": LEAST["messages"], "surprise": value},
                {"messages": [{**LEAST["messages"][0], "surprise": value}]},
            ):
                valid = Draft202012Validator(body_of(document, "/v1/chat/completions")).is_valid(surprised)
                assert valid is taken
                assert (client.post("/v1/chat/completions", json=surprised).status_code == 200) is taken


def test_a_server_with_keys_says_so() -> None:
    with alphabet_server(options=AppOptions(api_keys=("key",))) as server, server.client() as client:
        assert client.get("/openapi.json").status_code == 401
        document = client.get("/openapi.json", headers={"Authorization": "Bearer key"}).json()
    assert document["security"] == [{"key": []}]

"""Behind a proxy that serves us under a prefix, whether it takes the prefix off or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from http_server import Running, alphabet_server
from paged_openai.app import AppOptions

BODY: dict[str, Any] = {"prompt": "A", "max_tokens": 2}
KEY = {"Authorization": "Bearer key"}


@pytest.fixture(scope="module")
def prefixed() -> Iterator[Running]:
    with alphabet_server(options=AppOptions(root_path="/llm", api_keys=("key",))) as running:
        yield running


def test_routes_are_the_same_with_the_prefix_and_without(prefixed: Running) -> None:
    with prefixed.client(headers=KEY) as client:
        for path in ("/llm/v1/completions", "/v1/completions", "/llm/v1/completions/"):
            assert client.post(path, json=BODY).json()["choices"][0]["text"] == "BC", path
        for page in ("/llm", "/llm/", "/"):
            assert "<html" in client.get(page, headers={"accept": "text/html"}).text, page
        assert client.post("/llm/elsewhere").status_code == client.post("/llmv1/completions").status_code == 404
        assert client.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_keys_are_asked_for_behind_the_prefix_too(prefixed: Running) -> None:
    with prefixed.client() as client:
        assert client.post("/llm/v1/completions", json=BODY).status_code == 401
        assert client.get("/llm/health").status_code == 200
        assert client.get("/llm/v1/models").json()["error"]["type"] == "authentication_error"


def test_a_proxy_says_the_prefix_that_it_has_taken_off() -> None:
    with alphabet_server() as server, server.client() as client:
        assert "servers" not in client.get("/openapi.json").json()
        told = client.get("/openapi.json", headers={"x-forwarded-prefix": "/team/llm/"}).json()
        assert told["servers"] == [{"url": "/team/llm"}]
        for nonsense in ("//evil.example", "https://evil.example", "/a b", ""):
            assert "servers" not in client.get("/openapi.json", headers={"x-forwarded-prefix": nonsense}).json()

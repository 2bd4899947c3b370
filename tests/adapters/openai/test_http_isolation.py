"""Whatever a tokenizer, a chat template or a plugin raises for one request costs that request: others and the server
go on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from bad_request import MyOwn
from http_server import LIMIT_S, Running, alphabet_server, until
from paged_core import hookimpl
from toy_tokenizers import CharacterTokenizer

BASE_EXCEPTIONS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration, MyOwn]


class Choking(CharacterTokenizer):
    """Raises ``kind`` where it is to read "!" or "?", the stepping thread to spell "{", or another thread "Z"."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self._kind = kind

    def encode(self, text: str, **options: Any) -> list[int]:
        self._choke(text, "!")
        return super().encode(text, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        self._choke(str(messages), "?")
        return super().apply_chat_template(messages, **options)

    def decode(self, token_ids: Any, **options: Any) -> str:
        text = super().decode(token_ids, **options)
        self._choke(text, "{" if threading.current_thread().name == "paged-engine" else "Z")
        return text

    def _choke(self, text: str, on: str) -> None:
        if on in text:
            raise self._kind


def choking_processors(kind: type[BaseException]) -> Any:
    """A plugin whose processor raises for prompts that begin with "$"."""

    def create_logits_processor(request: Any) -> Any:
        def processor(input_ids: Any, scores: Any) -> Any:
            if input_ids.shape[1] == 3:
                raise kind
            return scores

        return processor if request.tokens[0] == ord("$") - 32 else None

    return SimpleNamespace(create_logits_processor=hookimpl(create_logits_processor))


def completion(prompt: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}


def chat(content: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": content}]
    return "/v1/chat/completions", {"messages": messages, "max_tokens": 5, "temperature": 0, **fields}


PLACES = {  # where it is raised -> a request that comes there
    "the prompt is read": completion("A!"),
    "the second prompt is read": completion(["A", "A!"]),
    "a prompt is read for TGI": ("/generate", {"inputs": "A!"}),
    "a text is tokenized": ("/tokenize", {"inputs": "A!"}),
    "the chat template renders": chat("A?"),
    "the answer's text is made": completion("y"),
    "the answer's text is made, streamed": completion("y", stream=True),
    "tokens are named": completion("X", logprobs=1),
    "tokens are named, streamed": completion("X", logprobs=1, stream=True),
    "tokens of several streams are named": completion(["X", "W"], logprobs=1, stream=True),
    "tokens of a chat are named": chat("A", logprobs=True, allowed_token_ids=[ord("Z") - 32]),
    "tokens of a chat are named, streamed": chat("A", logprobs=True, stream=True, allowed_token_ids=[ord("Z") - 32]),
    "tokens of the prompt are named": completion("AZ", prompt_logprobs=1),
    "tokens of the prompt are named, streamed": completion("AZ", prompt_logprobs=1, stream=True),
    "the prompt is echoed": completion([ord("Z") - 32], echo=True),
    "a vocabulary is made for grammars": completion("A", guided_regex="[A-C]+"),
    "TGI's tokens are told": ("/generate", {"inputs": "X", "parameters": {"details": True}}),
    "TGI's tokens are streamed": ("/generate_stream", {"inputs": "X"}),
    "the plugin's processor runs": completion("$"),
    "the plugin's processor runs, streamed": completion("$", stream=True),
}


def outcome(client: httpx2.Client, path: str, body: dict[str, Any]) -> str:
    """One of: "refused", "cut" (an error after a stream's beginning), or the answer, which nobody expects."""
    response = client.post(path, json=body)
    if response.status_code >= 400 and response.json()["error"]:
        return "refused"
    told = events(response.text)
    return "cut" if told and "error" in told[-1] else response.text


def events(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


@contextmanager
def neighbour(server: Running) -> Iterator[list[str]]:
    """One who streams as long as the block lasts, again and again; yields the texts that came."""
    texts: list[str] = []
    left = threading.Event()

    def stream() -> None:
        path, body = completion(" ", max_tokens=9, stream=True)
        with server.client() as client:
            while not left.is_set():
                told = events(client.post(path, json=body).text)
                texts.append("".join(event["choices"][0]["text"] for event in told))

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield texts
    finally:
        left.set()
        thread.join(LIMIT_S)
    assert not thread.is_alive(), "the neighbour's answer never came"


STREAMED = {place for place, (path, body) in PLACES.items() if body.get("stream") or path == "/generate_stream"}


@pytest.mark.parametrize("kind", BASE_EXCEPTIONS)
def test_what_is_raised_for_one_request_costs_that_request(kind: type[BaseException]) -> None:
    with alphabet_server(tokenizer=Choking(kind), plugins=[choking_processors(kind)]) as server:
        with server.client() as client, neighbour(server) as texts:
            told = {place: outcome(client, *request) for place, request in PLACES.items()}
            assert [(place, told[place]) for place in told if told[place] not in ("refused", "cut")] == []
            assert {place for place in told if told[place] == "cut"} <= STREAMED
            path, body = completion("A")
            assert client.post(path, json=body).json()["choices"][0]["text"] == "BCDEF"
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            until(lambda: len(texts) > 0)
        server.come_to_rest()
    assert set(texts) == {"!\"#$%&'()"}

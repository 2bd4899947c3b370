"""What one request brings to read, to compile or to tokenise holds up nobody else, and costs its sender a 400."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from http_server import LIMIT_S, alphabet_server, until
from paged_serving import RequestLimits
from paged_serving.grammars import trials
from toy_tokenizers import CharacterTokenizer

SMALL: dict[str, Any] = {"prompt": "A", "max_tokens": 2, "temperature": 0}
PATTERNS = [{"pattern": f".*[a-z]{{{number}}}q.*"} for number in range(20)]
BOMBS: list[dict[str, Any]] = [
    {"guided_regex": "((a{1000}){1000}){1000}"},
    {"guided_json": {"type": "integer", "multipleOf": 99999989}},
    {"guided_json": {"type": "string", "allOf": PATTERNS}},
    {"guided_grammar": "start: T\nT: " + " & ".join(f"/{each['pattern']}/" for each in PATTERNS)},
]
READING, READ_ON = threading.Semaphore(0), threading.Event()


class SlowWithBooks(CharacterTokenizer):
    """Takes as long for a long text as the test wants."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        if len(text) > 16_384:
            READING.release()
            assert READ_ON.wait(LIMIT_S)
        return super().encode(text, add_special_tokens=add_special_tokens)


def test_long_prompts_are_tokenised_beside_short_ones() -> None:
    READ_ON.clear()
    book = {**SMALL, "prompt": "A" * 40_000}
    with (
        alphabet_server(tokenizer=SlowWithBooks()) as server,
        server.client() as client,
        ThreadPoolExecutor(8) as pool,
    ):
        try:
            books = [pool.submit(client.post, "/v1/completions", json=book) for _ in range(8)]
            assert READING.acquire(timeout=LIMIT_S)
            until(lambda: server.service.num_open == 8)
            for _ in range(3):
                assert client.post("/v1/completions", json=SMALL).json()["choices"][0]["text"] == "BC"
                assert client.post("/tokenize", json={"inputs": "A"}).status_code == 200
                assert client.get("/health").status_code == 200
            assert not any(each.done() for each in books), "they are still being read"
        finally:
            READ_ON.set()
        refused = [each.result(LIMIT_S) for each in books]
        assert {each.status_code for each in refused} == {400}
        assert "maximum context length" in refused[0].text
        server.come_to_rest()


def test_bombs_cost_their_senders_a_400_while_others_are_served() -> None:
    """Counted, and not timed: as long as bombs are being tried, small requests come through."""
    limits = RequestLimits(max_grammar_ms=150)
    with alphabet_server(limits=limits) as server, server.client() as client, ThreadPoolExecutor(4) as pool:
        client.post("/v1/completions", json={**SMALL, "guided_regex": "[A-Z]+"})  # the process that tries them is there
        bombs = [pool.submit(client.post, "/v1/completions", json={**SMALL, **bomb}) for bomb in BOMBS * 3]
        num_served = 0
        while not all(each.done() for each in bombs):
            assert client.post("/v1/completions", json=SMALL).json()["choices"][0]["text"] == "BC"
            assert client.get("/health").status_code == 200
            num_served += not all(each.done() for each in bombs)
        assert {each.result().status_code for each in bombs} == {400}
        assert num_served >= 3
        server.come_to_rest()


def test_where_the_machine_has_no_time_for_a_trial_the_client_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gives_up = "serve; from paged_serving.grammars import trial; trial._BUSY_S = -0.45; serve"
    monkeypatch.setattr(trials, "_START", trials._START.replace("serve; serve", gives_up))
    with alphabet_server() as server, server.client() as client:
        response = client.post("/v1/completions", json={**SMALL, **BOMBS[1]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "too busy" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json=SMALL).status_code == 200
        server.come_to_rest()

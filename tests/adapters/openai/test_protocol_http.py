"""Over HTTP: what a request brings on itself is told to its client alone; a dead engine is not the client's doing."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from http_server import LIMIT_S, Running, alphabet_server, until

BODY = {"prompt": "A", "max_tokens": 9, "temperature": 0}
CONTRADICTION = {**BODY, "guided_regex": "ab", "bad_words": ["b"]}


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_structure_and_bans_that_contradict_each_other_are_a_400(server: Running) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", json=CONTRADICTION)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "no token is left to choose" in response.json()["error"]["message"]
        parameters = {"grammar": {"type": "regex", "value": "ab"}, "max_new_tokens": 5}
        assert client.post("/generate", json={"inputs": "A", "parameters": parameters}).status_code == 200
        assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "BCDEFGHIJ"
    server.come_to_rest()


def test_in_a_stream_it_is_the_last_event(server: Running) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", json={**CONTRADICTION, "stream": True})
    *pieces, last = events(response.text)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "a"
    assert last["error"]["type"] == "invalid_request_error"
    assert "no token is left to choose" in last["error"]["message"]


def test_what_the_engine_alone_can_tell_names_the_field(server: Running) -> None:
    with server.client() as client:
        assert client.post("/v1/completions", json={**BODY, "n": 65, "temperature": 1}).json()["error"]["param"] == "n"


def test_when_the_engine_is_gone_calls_are_told_503() -> None:
    with alphabet_server() as server, server.client() as client:
        server.engine.close()
        for path, body in (("/v1/completions", BODY), ("/generate", {"inputs": "A"})):
            response = client.post(path, json=body)
            assert response.status_code == 503
            assert "restarted" in response.text
        assert client.post("/v1/completions", json={**BODY, "stream": True}).status_code == 503


def test_grammars_that_are_being_tried_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()
    monkeypatch.setattr("paged_serving.grammars.trials.Trials.verdict", lambda *_: tried.wait(LIMIT_S) and "it is bad")
    answers: list[int] = []

    def ask(number: int) -> None:
        with server.client() as client:
            answers.append(client.post("/v1/completions", json={**BODY, "guided_regex": f"a{number}"}).status_code)

    with alphabet_server() as server:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: server.service.num_open == 20)
        with server.client() as client:
            assert client.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "BCDEFGHIJ"
            assert client.post("/tokenize", json={"inputs": "A"}).status_code == 200
        assert not answers
        tried.set()
        for thread in threads:
            thread.join(LIMIT_S)
        assert answers == [400] * 20
        server.come_to_rest()

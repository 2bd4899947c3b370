"""What a request's head may say to do harm: origins that are no URLs, hosts that aren't ours, bytes for terminals."""

from __future__ import annotations

import json
import logging

import pytest

from http_server import Running, alphabet_server, until
from paged_openai.app import AppOptions
from paged_openai.logs import JSONLines


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://]", "//[", "http://\u2100.example", "[", ""])
def test_an_origin_that_is_no_url_is_another_origin(server: Running, origin: str) -> None:
    with server.client() as client:
        answer = client.post("/generate", json={"inputs": "A"}, headers={"Origin": origin.encode()})
    assert answer.status_code == 403
    assert "--cors-origin" in answer.text


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_a_slash_at_a_routes_end_changes_nothing_and_sends_nobody_elsewhere(keys: tuple[str, ...]) -> None:
    foreign = {"Host": "evil.example"}
    with alphabet_server(options=AppOptions(api_keys=keys)) as server, server.client() as client:
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(f"{path}/", headers=foreign).status_code == 200
        known = {**foreign, "Authorization": "Bearer secret"}
        models = client.get("/v1/models/", headers=known)
        assert models.json() == client.get("/v1/models", headers=known).json()
        answer = client.post("/v1/completions/", json={"prompt": "A", "max_tokens": 2, "temperature": 0}, headers=known)
        assert answer.json()["choices"][0]["text"] == "BC"
        for path in ("/nowhere/", "/metrics//", "/v1/"):
            assert client.get(path, headers=known).status_code == 404
        if keys:
            assert client.get("/v1/models/", headers=foreign).status_code == 401


def test_a_host_that_is_none_is_of_no_account(server: Running) -> None:
    with server.client() as client:
        assert client.get("/nowhere", headers={"Host": "["}).status_code == 404
        assert client.get("/generate", headers={"Host": "["}).status_code == 405
        assert client.get("/health", headers={"Host": "["}).status_code == 200


def test_no_byte_that_moves_a_terminal_reaches_the_log() -> None:
    nasty = "a\x1b[2J\x7f\x85\x9b31m\u2028\u202e\u2066\ud800\ufeffz\u00e9"
    record = logging.LogRecord("x", logging.INFO, "", 0, "said %s", (nasty,), None)
    record.fields = {nasty: nasty}
    line = JSONLines().format(record)
    assert json.loads(line)["message"] == f"said {nasty}", "it is told all the same"
    assert json.loads(line)[nasty] == nasty
    raw = [character for character in line if not character.isprintable()]
    assert not raw
    assert "\u00e9" in line, "what can be read stays readable"


def test_a_path_of_control_characters_is_logged_harmlessly(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "paged_openai.requests"), server.client() as client:
        client.get("/%C2%9B31m%C2%85")
        until(lambda: any(each.message == "request" for each in caplog.records))
    (record,) = [each for each in caplog.records if each.message == "request"]
    line = JSONLines().format(record)
    assert line.isprintable()
    assert json.loads(line)["path"] == "/\x9b31m\x85"

"""Hostile traffic leaves a server that answers correctly, with all blocks free. ``python tests/hostile_traffic.py``
sends much more of it."""

from __future__ import annotations

import threading

import pytest

from hostile_bytes import hostile_bytes
from hostile_traffic import schema_driven, see_that_nothing_is_left, watched_server
from http_server import until


def test_requests_drawn_from_our_own_document_are_answered_as_it_says() -> None:
    with watched_server() as server:
        statuses = schema_driven(server, 60, 5)
        see_that_nothing_is_left(server)
    assert statuses[200] > 10, "some are good"
    assert statuses[400] + statuses[422] > 10, "and some are not"


def test_hostile_bytes_leave_nothing_behind() -> None:
    num_threads = threading.active_count()
    with watched_server() as server:
        done = hostile_bytes(server, 72, 5)
        see_that_nothing_is_left(server)
    assert done.total() == 72
    until(lambda: threading.active_count() <= num_threads)


def test_what_a_server_logs_as_an_error_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("paged_openai.app.tokenize", broken)
    with pytest.raises(AssertionError, match="a bug of ours"), watched_server() as server, server.client() as client:
        assert client.post("/tokenize", json={"inputs": "A"}).status_code == 500

"""benchmarks/bench_serving.py against a real server: many streams at once all end, and figures mean what they say."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import pytest
from http_server import alphabet_server

from paged_core import EngineConfig


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("bench_serving")


def run(bench: Any, target: Any, asks: list[Any]) -> tuple[list[Any], Any]:
    answers, duration_s = asyncio.run(bench.drive(target, asks, None, lambda num_done: None))
    return answers, bench.summarise(answers, duration_s, 60.0, 60.0)


def asks_of(bench: Any, num: int) -> list[Any]:
    return [bench.Ask(index, "!", (1,), 4 + index % 5) for index in range(num)]


def test_many_streams_that_are_open_at_once_all_end(bench: Any) -> None:
    config = EngineConfig(num_blocks=512, max_num_seqs=32, attention_backend="reference")
    with alphabet_server(config=config, max_queue=1000) as server:
        asks = asks_of(bench, 250)
        answers, row = run(bench, bench.HTTPTarget(server.url, "openai", "alphabet"), asks)
        server.come_to_rest()
    assert row["errors"] == {}
    assert row["max_open"] > 200
    assert [answer.num_tokens for answer in answers] == [ask.num_output for ask in asks]
    assert {answer.text for answer in answers if answer.num_tokens == 4} == {'"#$%'}
    assert row["goodput_per_s"] == pytest.approx(row["requests_per_s"])


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "tgi"])
def test_every_backend_is_read_and_compared_with_the_engine(bench: Any, backend: str) -> None:
    asks = asks_of(bench, 6)
    with alphabet_server() as server:
        over_http, row = run(bench, bench.HTTPTarget(server.url, backend, "alphabet"), asks)
        direct, _ = run(bench, bench.EngineTarget(server.engine), asks)
    assert (row["num_errors"], row["num_requests"]) == (0, 6)
    assert [answer.num_tokens for answer in over_http] == [ask.num_output for ask in asks]
    found = bench.agreement(direct, over_http)
    assert found["num_compared"] == 6
    assert found["num_identical"] == (0 if backend == "openai-chat" else 6), "a chat has another prompt"


def test_errors_are_counted_and_told(bench: Any) -> None:
    with alphabet_server() as server:
        _, row = run(bench, bench.HTTPTarget(server.url, "openai", "nobody"), asks_of(bench, 3))
    assert row["num_errors"] == 3
    assert row["goodput_per_s"] == 0
    assert "404" in next(iter(row["errors"]))

"""benchmarks/bench_serving.py against a real server: many streams at once all end, and figures mean what they say."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from http_server import alphabet_server, until
from paged_core import EngineConfig
from places import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_serving")


def run(bench: Any, target: Any, asks: list[Any]) -> tuple[list[Any], Any]:
    answers, duration_s = asyncio.run(bench.drive(target, asks, None, lambda num_done: None))
    answers = [bench.read(answer) for answer in answers]
    return answers, bench.summarise(answers, duration_s, math.inf, math.inf)


def asks_of(bench: Any, num: int) -> list[Any]:
    return [bench.Ask(index, "!", (1,), 4 + index % 5) for index in range(num)]


def test_many_streams_that_are_open_at_once_all_end(bench: Any) -> None:
    config = EngineConfig(num_blocks=512, max_num_seqs=32, attention_backend="reference")

    def when_all_are_there(token_ids: list[int]) -> None:
        until(lambda: all_came.is_set() or server.service.num_open == 250)
        all_came.set()

    all_came = threading.Event()
    with alphabet_server(AlphabetModel(when_all_are_there), config=config, max_queue=1000) as server:
        asks = asks_of(bench, 250)
        answers, row = run(bench, bench.HTTPTarget(server.url, "openai", "alphabet"), asks)
        server.come_to_rest()
    assert row["errors"] == {}
    assert row["max_open"] == 250
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
    found = importlib.import_module("serving_results").agreement(direct, over_http)
    assert found["num_compared"] == 6
    assert found["num_identical"] == (0 if backend == "openai-chat" else 6), "a chat has another prompt"


@pytest.mark.parametrize(
    ("backend", "extra", "num"), [("openai", {}, 9), ("openai", {"ignore_eos": None}, 3), ("tgi", {}, 3)]
)
def test_the_end_token_means_the_same_to_the_engine_and_the_server(
    bench: Any, backend: str, extra: dict[str, Any], num: int
) -> None:
    asks = [bench.Ask(0, "}", (93,), 9)]  # two characters before the end
    with alphabet_server() as server:
        over_http, _ = run(bench, bench.HTTPTarget(server.url, backend, "alphabet", None, extra), asks)
        direct, _ = run(bench, bench.EngineTarget(server.engine, bench.ignores_eos(backend, extra)), asks)
    assert over_http[0].num_tokens == direct[0].num_tokens == num


def test_errors_are_counted_and_told(bench: Any) -> None:
    with alphabet_server() as server:
        _, row = run(bench, bench.HTTPTarget(server.url, "openai", "nobody"), asks_of(bench, 3))
    assert row["num_errors"] == 3
    assert row["goodput_per_s"] == 0
    assert "404" in next(iter(row["errors"]))


def test_a_trace_is_replayed_against_two_servers_and_their_texts_compared(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,37,12\n2023-11-16 18:15:50.9951690,4,20\n2023-11-16 18:15:51.2225670,9,8\n"
    )
    with alphabet_server() as server:
        for other in (server.url.replace("127.0.0.1", "localhost"), server.url):
            given = ["--url", server.url, "--compare-url", other, "--backend", "tgi", "--trace", str(trace),
                     "--time-scale", "0.01", "--max-prompt-tokens", "20",
                     "--json", str(tmp_path / "found.json")]  # fmt: skip
            monkeypatch.setattr("sys.argv", ["bench_serving.py", *given])
            assert bench.main() == 0
            assert "3 of 3 texts are the same" in capsys.readouterr().out
            found = json.loads((tmp_path / "found.json").read_text())
            assert [row["num_requests"] for rows in found["systems"].values() for row in rows] == [3, 3]
            assert "trace trace.csv" in found["workload"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--url", "http://x", "--trace", "missing.csv"], "missing.csv isn't a file"),
        (["--in-process", "smollm2", "--compare-url", "http://x"], "--compare-url goes with --url"),
        ([], "give --url or --in-process"),
    ],
)
def test_options_that_can_mean_nothing_are_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_serving.py", *given])
    with pytest.raises(SystemExit):
        bench.main()
    assert told in capsys.readouterr().err

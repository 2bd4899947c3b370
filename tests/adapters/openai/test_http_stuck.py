"""An engine whose step doesn't end: probes tell it, clients get answers, and the server still ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from alphabet_model import AlphabetModel, Gate
from http_server import LIMIT_S, alphabet_server, until
from paged_core import AsyncEngine, Engine, EngineConfig
from paged_openai.exchange import CuttableExchange
from paged_serving import CallError
from places import TESTS
from toy_tokenizers import CharacterTokenizer

LONG = {"prompt": "!", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def in_background(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    """Returns what waits for the result."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function(*args, **options)), daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(LIMIT_S)
        assert found, "it never ended"
        return found[0]

    return result


def test_a_step_that_doesnt_end_shows_in_health_and_takes_no_more_calls(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate), service_options={"step_timeout_s": 0.3}) as server:
        with server.client() as client:
            time.sleep(0.5)
            assert client.get("/health").status_code == 200, "an engine without work isn't stuck"
            gate.shut()
            waiting = in_background(client.post, "/v1/completions", json={"prompt": "A", "max_tokens": 2})
            until(lambda: client.get("/health").status_code == 503)
            assert "0.3 s" in client.get("/health").json()["error"]
            assert client.get("/ready").status_code == 503
            refused = client.post("/v1/completions", json={"prompt": "A"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            gate.open()
            assert waiting().status_code == 200
            until(lambda: client.get("/health").status_code == client.get("/ready").status_code == 200)  # it was slow
            assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 200
        server.come_to_rest()


def test_a_request_that_takes_too_long_is_answered_though_the_engine_is_stuck(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate), timeout_s=0.3) as server, server.client() as client:
        gate.shut()
        answers = [
            in_background(client.post, "/v1/completions", json=LONG),
            in_background(client.post, "/v1/completions", json={**LONG, "stream": True}),
            in_background(client.post, "/v1/completions", json={**LONG, "stream": True, "prompt": ["!", "A"]}),
            in_background(client.post, "/generate", json={"inputs": "A"}),
        ]
        assert [answer().status_code for answer in answers] == [504, 504, 504, 500]
        until(lambda: server.service.num_open == 0)
        gate.open()
        server.come_to_rest()


def test_a_stream_that_has_begun_gets_its_last_event_though_the_engine_is_stuck(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cut = threading.Event(), CuttableExchange.cut

    def cut_what_has_begun(exchange: CuttableExchange, error: CallError) -> None:
        if begun.is_set():
            cut(exchange, error)
        else:
            asyncio.get_running_loop().call_later(0.01, exchange.cut, error)

    monkeypatch.setattr(CuttableExchange, "cut", cut_what_has_begun)
    gate.shuts_at = 6
    with alphabet_server(AlphabetModel(gate), timeout_s=0.3) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            events = response.iter_lines()
            assert "data: {" in next(events)
            until(lambda: gate.num_steps == 6)
            begun.set()
            text = "\n".join(events)
        assert '"timeout_error"' in text and text.rstrip().endswith("data: [DONE]")
        gate.open()
        server.come_to_rest()


def test_the_page_isnt_left_waiting_by_a_stuck_engine(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_openai.page._PATIENCE_S", 0.2)
    with alphabet_server(AlphabetModel(gate)) as server, server.client() as client:
        gate.shut()
        waiting = in_background(client.post, "/generate", json={"inputs": "A"})
        until(lambda: gate.num_steps > 0)
        assert [client.get("/live").status_code for _ in range(2)] == [503, 503]
        gate.open()
        assert waiting().status_code == 200
        until(lambda: client.get("/live").status_code == 200)


def test_at_the_deadline_of_a_shutdown_every_client_has_an_answer_though_the_engine_is_stuck(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate), shutdown_timeout_s=0.2) as server, server.client() as client:
        gate.shut()
        plain = in_background(client.post, "/v1/completions", json=LONG)
        streamed = in_background(client.post, "/v1/completions", json={**LONG, "stream": True})
        until(lambda: server.service.num_open == 2)
        server.stop()
        assert plain().status_code == streamed().status_code == 503
        assert "shutting down" in streamed().text
        gate.open()


def test_closing_an_engine_can_have_a_deadline(gate: Gate) -> None:
    engine = AsyncEngine(
        Engine(AlphabetModel(gate), EngineConfig(num_blocks=64, attention_backend="reference")),
        tokenizer=CharacterTokenizer(),
    )
    assert engine.busy_s == 0
    gate.shut()
    stream = engine.submit("A")
    until(lambda: engine.busy_s > 0.1)
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        engine.close(0.1)
    gate.open()
    engine.close()
    assert stream.result(LIMIT_S).finished


STUCK = """
import sys, threading
sys.path[:0] = [{tests!r}]
import paged_openai.serving as serving
from alphabet_model import AlphabetModel
from paged_core import Engine
from toy_tokenizers import CharacterTokenizer

def forever(token_ids):
    print("a step begins", file=sys.stderr, flush=True)
    threading.Event().wait()

stuck = AlphabetModel(forever)
serving.Engine = lambda model, config, **options: Engine(stuck, config, plugins=options["plugins"])
serving.AsyncEngine = lambda engine, old=serving.AsyncEngine, **options: old(
    engine, **{{**options, "tokenizer": CharacterTokenizer()}}
)
serving._LAST_STEP_S = 0.5
from paged_openai.commands import main
sys.exit(main(["--model", "x", "--port", "0", "--shutdown-timeout", "0.2", "--attention-backend", "reference",
               "--kv-bytes", "1000000"]))
"""


def test_the_process_ends_though_the_engine_is_stuck(tmp_path: Path) -> None:
    program = STUCK.format(tests=str(TESTS))
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", program], stderr=file)
    try:
        until(lambda: "Uvicorn running on" in log.read_text(), 120)
        port = log.read_text().split("running on http://127.0.0.1:")[1].split()[0]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S, trust_env=False) as client:
            waiting = in_background(client.post, "/v1/completions", json=LONG)
            until(lambda: "a step begins" in log.read_text())
            process.send_signal(signal.SIGTERM)
            assert waiting().status_code == 503
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait(60)
    assert "leaving a stuck engine" in log.read_text()

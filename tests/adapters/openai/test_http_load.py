"""Clients that leave, a full server, and its end: nobody holds others up, and everybody is answered."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError

from alphabet_model import AlphabetModel, Gate
from http_calls import LONG, Background, events
from http_server import alphabet_server, until
from paged_core import EngineConfig

# ---- clients that leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_costs_nothing_more(gate: Gate, stream: bool) -> None:
    with alphabet_server(AlphabetModel(gate)) as server:
        gate.shut()
        body = json.dumps({**LONG, "stream": stream, "n": 2, "temperature": 1}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: gate.num_steps > 0)
        server.wait_until_told_to_cancel()
        gate.open()
        server.come_to_rest()
        assert gate.num_steps < 150, "200 tokens would have taken as many steps"


def test_a_client_that_leaves_in_the_middle_of_several_prompts_costs_nothing_more(gate: Gate) -> None:
    gate.shuts_at = 10
    with alphabet_server(AlphabetModel(gate)) as server:
        with server.client() as client, client.stream("POST", "/v1/completions", json={
            **LONG, "prompt": ["!", "#", "%"], "stream": True
        }) as response:  # fmt: skip
            lines = response.iter_lines()  # kept: its end would be the response's
            next(lines)
            until(lambda: gate.num_steps == gate.shuts_at)
        server.wait_until_told_to_cancel(3)
        gate.open()
        server.come_to_rest()
        assert gate.num_steps < 150


def test_a_client_that_reads_nothing_holds_nobody_up() -> None:
    with alphabet_server(config=EngineConfig(num_blocks=2048, attention_backend="reference")) as server:
        body = json.dumps({**LONG, "stream": True, "n": 16, "max_tokens": 99, "logprobs": 20}).encode()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with raw:
            raw.connect(("127.0.0.1", server.port))
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            with server.client() as client:
                assert client.post("/generate", json={"inputs": "A"}).status_code == 200
        server.come_to_rest()


# ---- a full server -----------------------------------------------------------------------------------------------


def test_a_full_queue_is_told_with_a_time_to_come_back(gate: Gate) -> None:
    config = EngineConfig(num_blocks=512, max_num_seqs=2, attention_backend="reference")
    with alphabet_server(AlphabetModel(gate), config=config, max_queue=1) as server:
        gate.shut()
        taken = [Background(server, "/v1/completions", {"prompt": "A", "max_tokens": 2, "n": n}) for n in (2, 1)]
        until(lambda: server.service.num_open == 3)
        with server.client() as client:
            refused = client.post("/v1/completions", json={"prompt": "A"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["type"] == "overloaded_error"
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
        with InferenceClient(server.url, token="none") as hub, pytest.raises(OverloadedError):
            hub.text_generation("A")
        gate.open()
        assert [each.result().status_code for each in taken] == [200, 200]
        with server.client() as client:
            assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 200
            too_many = client.post("/v1/completions", json={"prompt": "A", "n": 4})
            assert too_many.status_code == 400, "it would never fit, so there is no use in coming back"


def test_an_engine_that_takes_no_more_is_told_with_a_time_to_come_back(gate: Gate) -> None:
    """Those whose clients have left count too, until the engine has heard of it."""
    with alphabet_server(AlphabetModel(gate), max_requests=2) as server, server.client() as client:
        gate.shut()
        running = Background(server, "/v1/completions", {"prompt": "A", "max_tokens": 2})
        until(lambda: server.service.num_open == 1)
        with pytest.raises(httpx2.TimeoutException), server.client() as hasty:
            hasty.post("/generate", json={"inputs": "A"}, timeout=0.3)
        refused = client.post("/v1/completions", json={"prompt": "A"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "2 requests" in refused.json()["error"]["message"]
        assert client.post("/generate", json={"inputs": "A"}).status_code == 429
        gate.open()
        assert running.result().status_code == 200
        server.come_to_rest()


def test_a_request_that_takes_too_long_is_cut() -> None:
    done = threading.Event()
    with alphabet_server(AlphabetModel(lambda _: done.wait(0.05)), timeout_s=0.3) as server, server.client() as client:
        plain = Background(server, "/v1/completions", LONG)
        streamed = Background(server, "/v1/completions", {**LONG, "stream": True})
        assert plain.result().status_code == 504
        assert "not done in 0.3 s" in streamed.result().text  # a first token may have come, and then it is an event
        done.set()
        server.service.timeout_s = None
        assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 200
        server.come_to_rest()


# ---- the end -----------------------------------------------------------------------------------------------------


def test_at_the_end_running_requests_are_finished(gate: Gate) -> None:
    with alphabet_server(AlphabetModel(gate)) as server:
        gate.shut()
        running = Background(server, "/v1/completions", {**LONG, "stream": True})
        until(lambda: gate.num_steps > 0)
        server.server.should_exit = True
        until(lambda: server.service.draining and not server.server.servers[0].is_serving())
        assert not server.service.ready
        assert server.engine.alive
        with pytest.raises(httpx2.ConnectError), server.client() as client:
            client.get("/ready")
        gate.open()
        received = events(running.result().text)
    assert "".join(event["choices"][0]["text"] for event in received[:-1])[:3] == '"#$'
    assert received[-2]["choices"][0]["finish_reason"] == "length"
    assert received[-1] == "[DONE]"


def test_at_the_deadline_every_stream_gets_a_last_event() -> None:
    with alphabet_server(AlphabetModel(lambda _: time.sleep(0.05)), shutdown_timeout_s=0.2) as server:
        openai_stream = Background(server, "/v1/completions", {**LONG, "stream": True})
        tgi_stream = Background(server, "/generate_stream", {"inputs": "!", "parameters": {"max_new_tokens": 200}})
        plain = Background(server, "/v1/completions", LONG)
        until(lambda: openai_stream.began.is_set() and tgi_stream.began.is_set() and server.service.num_open == 3)
        server.server.should_exit = True
        *pieces, error, done = events(openai_stream.result().text)
        assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}, "cut, and not ended"
        assert "shutting down" in error["error"]["message"]
        assert done == "[DONE]"
        assert events(tgi_stream.result().text)[-1]["error_type"] == "incomplete_generation"
        assert plain.result().status_code == 503


def test_health_tells_a_dead_engine_and_ready_a_server_that_takes_no_more() -> None:
    with alphabet_server() as server, server.client() as client:
        server.service.draining = True
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
        refused = client.post("/v1/completions", json={"prompt": "A"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        server.service.draining = False
        server.engine.close()
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (503, 503)
        assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 503

"""What an operator relies on: full queues, leaving clients, limits, keys, logs, and a graceful end."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError

from alphabet_model import AlphabetModel, Gate
from http_server import LIMIT_S, Running, alphabet_server, request_lines, until
from paged_core import ConfigError, Engine, EngineConfig
from paged_openai.app import AppOptions
from paged_openai.commands import add_options, main, request_limits, serve
from paged_openai.keys import read_keys
from paged_openai.responses import _json_pieces, large_json_bytes
from paged_serving import RequestLimits, engine_config, json_bytes
from places import TESTS

LONG = {"prompt": "!", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(each) if each != "[DONE]" else each for each in data]


class Background:
    """A request under way in a thread of its own. ``began``: its answer has, a streamed one's with its first event."""

    def __init__(self, server: Running, path: str, body: dict[str, Any]) -> None:
        self._server, self._path, self._body = server, path, body
        self.began = threading.Event()
        self.response: httpx2.Response | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._server.client() as client, client.stream("POST", self._path, json=self._body) as response:
            self.began.set()
            response.read()
            self.response = response

    def result(self) -> httpx2.Response:
        self._thread.join(LIMIT_S)
        assert self.response is not None, "no answer came"
        return self.response


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
        server.service._timeout_s = None
        assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 200
        server.come_to_rest()


# ---- bodies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    options = AppOptions(api_keys=("first", "second"), cors_origins=("https://page.example",), max_body_bytes=2000,
                         tgi_chat_stream=True)  # fmt: skip
    limits = RequestLimits(max_prompt_tokens=20, max_tokens=50, max_n=2)
    with alphabet_server(options=options, limits=limits) as server:
        yield server


@pytest.fixture
def friend(guarded: Running) -> Iterator[httpx2.Client]:
    with guarded.client(headers={"Authorization": "Bearer second"}) as client:
        yield client


def test_limits_are_told_by_name(friend: httpx2.Client) -> None:
    for fields, param in (
        ({"prompt": "A" * 21}, "prompt"),
        ({"prompt": "A", "max_tokens": 51}, "max_tokens"),
        ({"prompt": "A", "n": 3}, "n"),
    ):
        refused = friend.post("/v1/completions", json=fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_penalty_that_would_make_numbers_overflow_is_refused_as_the_callers() -> None:
    with alphabet_server() as server, server.client() as client:
        for value in (0, 2e-38):
            refused = client.post("/v1/completions", json={"prompt": "A", "repetition_penalty": value})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "repetition_penalty"), refused.text
        assert client.post("/v1/completions", json={"prompt": "A", "repetition_penalty": 1e-6}).status_code == 200


def test_an_answer_whose_length_nobody_asks_for_keeps_the_servers_limit() -> None:
    with alphabet_server(limits=RequestLimits(max_tokens=7)) as server, server.client() as client:
        plain = client.post("/v1/completions", json={"prompt": "!", "temperature": 0}).json()
        assert (plain["choices"][0]["text"], plain["choices"][0]["finish_reason"]) == ("\"#$%&'(", "length")
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "!"}]}).json()
        assert chat["usage"]["completion_tokens"] == 7
        assert client.post("/generate", json={"inputs": "!"}).json()["generated_text"] == "\"#$%&'("


def test_a_method_that_is_not_for_a_route_is_told_which_are(friend: httpx2.Client) -> None:
    refused = friend.get("/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert set(friend.delete("/info").headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_models_are_listed_with_a_slash_at_the_end_too(friend: httpx2.Client) -> None:
    assert friend.get("/v1/models/").json() == friend.get("/v1/models").json()


def test_a_body_that_is_too_large_is_refused_however_it_comes(friend: httpx2.Client) -> None:
    assert friend.post("/generate", content=b" " * 2001).status_code == 413
    refused = friend.post("/v1/completions", content=(b" " * 100 for _ in range(21)))
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_body_that_never_comes_is_not_waited_for() -> None:
    with (
        alphabet_server(options=AppOptions(body_timeout_s=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S) as raw,
    ):
        raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"prompt": NaN}', b"[" * 1900])
def test_a_malformed_body_is_the_callers_mistake(friend: httpx2.Client, content: bytes) -> None:
    assert friend.post("/v1/completions", content=content).status_code == 400
    assert friend.post("/generate", content=content).status_code == 422


HOSTILE = [
    b"",
    b"\x16\x03\x01\x02\x00\x01",  # TLS to a server that speaks none
    b"GET",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n" + b'{"inputs": "A"',
    b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\x00\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /%00%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"a" * 300_000 + b"\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n" + b'{"inputs": "A"}' * 3,
]


def test_hostile_bytes_leave_a_server_that_answers() -> None:
    with alphabet_server() as server:
        for data in HOSTILE:
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.settimeout(0.3)
                with suppress(OSError):
                    raw.sendall(data)
                    raw.recv(1000)
        with server.client() as client:
            assert client.post("/generate", json={"inputs": "A"}).status_code == 200
        server.come_to_rest()


def test_unknown_paths_and_methods_are_told_in_the_form_of_their_side(friend: httpx2.Client) -> None:
    assert friend.post("/v1/embeddings").json()["error"]["type"] == "not_found_error"
    assert friend.post("/elsewhere").json()["error_type"] == "not_found"
    assert friend.get("/v1/completions").status_code == 405


def test_chats_stream_as_tgis_client_reads_them_where_it_was_asked_for(friend: httpx2.Client) -> None:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 3}
    deltas = [event["choices"][0]["delta"] for event in events(friend.post("/v1/chat/completions", json=body).text)]
    assert [delta["role"] for delta in deltas] == ["assistant"] * len(deltas)
    assert all(delta["tool_calls"] is None for delta in deltas)
    assert "".join(delta["content"] for delta in deltas) == ";<="


def test_streams_end_with_done_elsewhere() -> None:
    with alphabet_server() as server, server.client() as client:
        response = client.post("/v1/completions", json={"prompt": "A", "stream": True, "max_tokens": 3})
        assert events(response.text)[-1] == "[DONE]"


# ---- who is let in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer firs", "Bearer first2", "Basic first", "first"])
def test_without_a_key_nobody_is_let_in(guarded: Running, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    with guarded.client(headers=headers) as client:
        refused = client.post("/v1/completions", json={"prompt": "A"})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "authentication_error"
        assert client.post("/generate", json={"inputs": "A"}).json()["error_type"] == "authentication"
        assert client.get("/v1/models").status_code == client.get("/nowhere").status_code == 401


def test_each_key_lets_in_and_probes_need_none(guarded: Running) -> None:
    for key in ("first", "second"):
        with guarded.client(headers={"Authorization": f"bearer {key}"}) as client:
            assert client.get("/v1/models").status_code == 200
    with guarded.client() as client:
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3


def test_keys_come_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nabc \nxyz\n")
    assert read_keys(file) == ["abc", "xyz"]
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        read_keys(file)
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys(tmp_path / "missing")


def test_pages_may_call_only_from_origins_that_were_named(guarded: Running) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with guarded.client() as client:
        good = client.options("/v1/completions", headers={"Origin": "https://page.example", **asks})
        assert good.headers["access-control-allow-origin"] == "https://page.example"
        bad = client.options("/v1/completions", headers={"Origin": "https://other.example", **asks})
        assert "access-control-allow-origin" not in bad.headers
    with alphabet_server() as server, server.client() as client:
        plain = client.get("/health", headers={"Origin": "https://page.example"})
        assert "access-control-allow-origin" not in plain.headers


OWN = "http://{host}"
CALLERS = [
    ({"Origin": OWN}, 200),
    ({"Origin": "https://named.example"}, 200),
    ({"Origin": "https://named.example", "Sec-Fetch-Site": "cross-site"}, 200),
    ({"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"}, 200),  # a proxy calls us by another name
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": OWN, "Sec-Fetch-Site": "same-site"}, 403),
    ({}, 200),  # no browser
]


def test_without_keys_only_pages_of_known_origins_may_have_a_browser_call() -> None:
    steps: list[object] = []
    options = AppOptions(cors_origins=("https://named.example",))
    with alphabet_server(AlphabetModel(steps.append), options=options) as server, server.client() as client:
        for headers, status in CALLERS:
            headers = {name: value.format(host=f"127.0.0.1:{server.port}") for name, value in headers.items()}
            for path in ("/v1/completions", "/generate", "/tokenize"):
                plain = {"content-type": "text/plain", **headers}  # browsers ask nobody before they send this
                content = b'{"prompt": "A"}' if path == "/v1/completions" else b'{"inputs": "A"}'
                steps.clear()
                answer = client.post(path, content=content, headers=plain)
                assert answer.status_code == status, (headers, path)
                assert bool(steps) == (status == 200 and path != "/tokenize")
                assert status == 200 or "--cors-origin" in answer.text
            assert client.get("/v1/models", headers=headers).status_code == 200, "the browser hides the answer"


def test_with_keys_the_key_decides(friend: httpx2.Client) -> None:
    foreign = {"Origin": "app://desktop"}
    assert friend.post("/generate", json={"inputs": "A"}, headers=foreign).status_code == 200


# ---- what is logged ----------------------------------------------------------------------------------------------


def test_each_request_is_one_line_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paged_openai")
    with alphabet_server() as server, server.client() as client:
        ours = client.post("/v1/completions", json={"prompt": "SECRET", "max_tokens": 3}).headers["x-request-id"]
        theirs = client.post("/generate", json={"inputs": "SECRET", "stream": 7}, headers={"X-Request-Id": "mine-7"})
        evil = client.post("/generate", json={}, headers={"X-Request-Id": "a b"}).headers["x-request-id"]
        list_ = client.post("/generate", json={"inputs": ["SECRET"]}).headers["x-request-id"]
        client.get("/health")
        lines = request_lines(caplog, 4)
    assert theirs.headers["x-request-id"] == "mine-7"
    assert " " not in evil
    told = {line["request_id"]: (line["status"], line.get("error")) for line in lines}
    assert len(lines) == 4
    assert told == {
        ours: (200, None),
        "mine-7": (422, "refused: stream"),
        evil: (422, "refused: inputs"),
        list_: (422, "refused: inputs"),
    }
    first = next(line for line in lines if line["request_id"] == ours)
    assert (first["path"], first["prompt_tokens"], first["output_tokens"]) == ("/v1/completions", 6, 3)
    assert first["finish_reasons"] == ["length"]
    assert first["duration_ms"] > 0
    assert "SECRET" not in json.dumps(lines)


def test_prompts_are_logged_if_the_operator_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paged_openai")
    with alphabet_server(options=AppOptions(log_prompts=True)) as server, server.client() as client:
        client.post("/v1/completions", json={"prompt": "KNOWN"})
        (line,) = request_lines(caplog, 1)
    assert "KNOWN" in json.dumps(line)


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


# ---- options -----------------------------------------------------------------------------------------------------


def test_options_become_configuration() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    said = ["--max-num-seqs", "7", "--kv-bytes", "1000000", "--no-prefix-caching", "--max-n", "3"]
    args = parser.parse_args(said)
    config = engine_config(args)
    assert (config.max_num_seqs, config.kv_cache_bytes, config.enable_prefix_caching) == (7, 1_000_000, False)
    assert request_limits(args) == RequestLimits(max_n=3)
    for wrong in (["--max-n", "0"], ["--body-timeout", "-1"], ["--max-queue", "-1"], ["--request-timeout", "nan"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_a_server_takes_most_of_its_gpu_and_a_size_that_was_said_goes_before_that() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = engine_config(parser.parse_args([]))
    assert (config.gpu_memory_utilization, config.cuda_graphs) == (0.9, None)
    said = ["--gpu-memory-utilization", "0.5", "--no-cuda-graphs", "--kv-bytes", "1000000"]
    config = engine_config(parser.parse_args(said))
    assert (config.gpu_memory_utilization, config.cuda_graphs) == (0.5, False)
    # on a CPU the share means nothing
    shares = [replace(config, gpu_memory_utilization=share) for share in (0.5, None)]
    assert len({Engine(AlphabetModel(), share).sizes.num_blocks for share in shares}) == 1
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        engine_config(parser.parse_args(["--gpu-memory-utilization", "90"]))


def test_large_answers_are_the_same_json_in_small_pieces() -> None:
    values: list[Any] = [
        {}, [], [[]], {"a": {}}, [{}], "ä\n\"", [1.5, "a", None], {"a": 1, "b": [1, {"c": [True]}]}, {"d": {3: {}}},
        list(range(1000)), [{"n": i, "of": [i] * 300} for i in range(300)], {"all": [{"p": [None, *[{7: 1}] * 600]}]},
    ]  # fmt: skip
    for value in values:
        assert json.loads(large_json_bytes(value)) == json.loads(json.dumps(value))
    assert large_json_bytes(values[8]) == json_bytes(values[8])
    assert max(map(len, _json_pieces([["x" * 10] * 100] * 10_000))) < 3000


def test_tls_is_spoken_with_a_certificate() -> None:
    pem = TESTS / "adapters" / "loopback.pem"
    with alphabet_server(ssl_certfile=pem) as server:
        trusting = ssl.create_default_context(cafile=pem)
        with httpx2.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusting, trust_env=False) as client:
            assert client.post("/generate", json={"inputs": "A"}).status_code == 200
        with pytest.raises(httpx2.TransportError), server.client() as client:
            client.get("/health")


def test_without_its_packages_a_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("serving", "server"):  # others may have imported them
        monkeypatch.delattr(f"paged_openai.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "paged_openai.serving", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "paged_openai.server")
    arguments = argparse.ArgumentParser()
    add_options(arguments)
    with pytest.raises(ConfigError, match=r"paged-core\[server\]"):
        serve(arguments.parse_args([]))


def test_tls_needs_a_certificate(tmp_path: Any) -> None:
    assert main(["--model", "x", "--ssl-keyfile", str(tmp_path / "key")]) == 2
    assert main(["--model", "x", "--ssl-certfile", str(tmp_path / "cert")]) == 2
    assert main(["--model", "x", "--api-key", ""]) == 2

"""A real TorchServe on loopback: Java's frontend, real archives, workers in processes of their own, HTTP clients."""

from __future__ import annotations

import os
import re
import signal
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import paged_torchserve.handler
import tiny_folder
from paged_core.cli import main
from paged_torchserve.server import ServerOptions, TorchServe
from torchserve_server import (
    ENGINE,
    LONG,
    MAX_MESSAGE,
    READY_S,
    Running,
    free_addresses,
    stock_archive,
    stock_generate,
)
from trial_processes import trial_processes
from waiting import until


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two models: "tiny", an archive with a stock handler that was swapped, and "narrow", which takes two at a time."""
    tmp = tmp_path_factory.mktemp("torchserve")
    model = tiny_folder.save(tmp / "model")
    theirs = tmp / "their_handler.py"
    theirs.write_text("class Theirs:\n    def handle(self, data, context):\n        raise RuntimeError\n")
    old = stock_archive(tmp, "tiny", model, theirs, "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\n")
    archives = [tmp / "swapped.mar", tmp / "narrow.mar"]
    on_disk = ["--set", f"kv_disk_path={tmp / 'kv'}", "--set", "kv_disk_bytes=50000000"]
    assert main(["torchserve", "swap", str(old), str(archives[0]), *ENGINE, *on_disk]) == 0
    narrow = ["--set", "max_num_requests=2", "--set", "jobQueueSize=2"]
    assert main(["torchserve", "archive", str(model), str(archives[1]), "--version", "2.0", *ENGINE, *narrow]) == 0
    options = ServerOptions(free_addresses(), model_api=True,
        properties={"max_response_size": str(MAX_MESSAGE), "max_request_size": "1000000"})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        server = TorchServe(archives, tmp / "work", options)
    with server:
        server.wait_until_ready(READY_S)
        running = Running(server, tmp / "kv")
        with running.client:
            yield running


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_generate()


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/predictions/tiny/1.0/v1", api_key="none", max_retries=0,
                       http_client=openai.DefaultHttpxClient(trust_env=False)) as client:  # fmt: skip
        yield client


# ---- answers ---------------------------------------------------------------------------------------------------


def test_many_clients_at_once_are_each_answered_as_by_stock_generate(running, stock):
    prompts = [f"Story {number}: " + "once upon a time " * (number % 5) for number in range(24)]

    def ask(prompt: str) -> str:
        response = running.post("tiny", json={"prompt": prompt, "max_new_tokens": 24})
        assert response.status_code == 200
        return response.text

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, prompts)) == [stock(prompt, 24) for prompt in prompts]


def test_stock_handlers_clients_find_their_shapes_answered(running, stock):
    said = stock("Hello", 100)
    assert running.post("tiny", content="Hello", headers={"content-type": "text/plain"}).text == said
    assert running.post("tiny/1.0", data={"data": "Hello"}).text == said
    assert running.post("tiny", files={"data": ("prompt.txt", b"Hello")}).text == said
    assert running.post("tiny", json={"data": "Hello"}).text == said
    assert running.post("tiny", content=b"Hello").text == said
    assert running.post("tiny", data={"data": "Hello", "max_new_tokens": "5"}).text == stock("Hello", 5)
    assert running.post("tiny", json=["Hello", "you"]).json() == [said, stock("you", 100)]
    with running.client.stream("POST", f"{running.url}/predictions/tiny",
                               json={"prompt": "Hello", "stream": True}) as response:  # fmt: skip
        assert b"".join(response.iter_bytes()).decode() == said
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 9}}
    assert running.post("tiny", json=body).json() == [{"generated_text": stock("Hello", 9)}]
    assert running.post("tiny/1.0/generate", json=body).json() == {"generated_text": stock("Hello", 9)}


def test_a_workers_log_isnt_filled_by_what_torchao_couldnt_load(running):
    told = running.server.log.read_text(encoding="utf-8", errors="replace")
    assert "tiny is ready" in told
    assert not re.search("torchao|_pytree", told)


def test_workers_have_what_the_first_grammar_needs_before_they_serve(running):
    pid = running.worker("tiny")["pid"]
    grammar = {"type": "regex", "value": "a{3}b"}
    assert len(trial_processes(pid)) == 1
    asked = {"inputs": "Hello", "parameters": {"grammar": grammar}}
    assert running.post("tiny", json=asked).json() == [{"generated_text": "aaab"}]


def test_unicode_goes_in_and_comes_out_whole(running, stock):
    prompt = "日本語 é 😀\n\x00 ﷽"
    assert running.post("tiny", json={"prompt": prompt, "max_new_tokens": 30}).text == stock(prompt, 30)
    body = {"prompt": prompt, "max_new_tokens": 3, "return_full_text": True}
    assert running.post("tiny", json=body).text.startswith(prompt)


def test_openais_client_works_with_a_version_in_its_base_url(client, stock):
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=12, temperature=0)
    assert answer.choices[0].text == stock("Hello", 12)
    assert answer.usage.completion_tokens == 12
    pieces = client.completions.create(model="tiny", prompt="Hello", max_tokens=60, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == stock("Hello", 60)
    messages: Any = [{"role": "user", "content": "Hello"}]
    said = stock("user: Hello\nassistant:", 20)
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
    assert chat.choices[0].message.content == said
    parts = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *deltas, last = list(parts)
    assert "".join(delta.choices[0].delta.content or "" for delta in deltas) == said
    assert last.usage.completion_tokens == 20


def test_an_answer_above_torchserves_size_limit_comes_in_pieces(client):
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=200, temperature=0, n=4, logprobs=5)
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [200] * 4
    assert len(answer.to_json()) > MAX_MESSAGE * 3


# ---- errors ----------------------------------------------------------------------------------------------------


def test_the_impossible_is_refused_with_a_status_and_the_running_go_on(running, client, stock):
    with running.streaming("tiny") as pieces:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="tiny", prompt="a", temperature=-1)
        with pytest.raises(openai.NotFoundError, match="other"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="2048"):
            client.completions.create(model="tiny", prompt="a" * 5000)
        with pytest.raises(openai.BadRequestError, match="100 sequences"):
            client.completions.create(model="tiny", prompt="a", max_tokens=9, n=100)
        for what, status in [
            ({"content": b""}, 422),
            ({"content": b"\xff\xfe\x00\x80"}, 422),
            ({"content": b"{", "headers": {"content-type": "application/json"}}, 200),  # text may begin so
            ({"content": b"\xff", "headers": {"content-type": "text/plain"}}, 422),
            ({"json": {"prompt": "a", "num_beams": 3}}, 422),
            ({"json": {"prompt": 7}}, 422),
            ({"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}, 422),
            ({"content": b'{"\\ud800": 1}', "headers": {"content-type": "application/json"}}, 422),
        ]:
            assert running.post("tiny", **what).status_code == status, what
        assert running.post("tiny/1.0/v1/nothing", json={}).status_code == 404
        assert running.post("tiny", content=b"a" * 1_500_000).status_code == 413
        assert len(next(pieces)) > 0
    assert running.post("tiny", json={"prompt": "Hello", "max_new_tokens": 9}).text == stock("Hello", 9)


def test_beyond_the_batch_requests_wait_and_beyond_the_queue_they_are_refused(running, stock):
    with ThreadPoolExecutor(6) as pool, running.streaming("narrow"), running.streaming("narrow"):
        before = running.metric("paged_generation_tokens_total", "narrow")
        sent = [pool.submit(running.post, "narrow", json={"prompt": "Hello", "max_new_tokens": 5}) for _ in range(6)]
        until(lambda: any(each.done() for each in sent))
        assert {each.result().status_code for each in sent if each.done()} == {503}
        until(lambda: running.metric("paged_generation_tokens_total", "narrow") > before)
    answered = [each.result() for each in sent if each.result().status_code != 503]
    assert [each.text for each in answered] == [stock("Hello", 5)] * len(answered)
    assert 2 <= len(answered) < 6


# ---- who leaves ------------------------------------------------------------------------------------------------


def test_clients_that_leave_free_their_blocks_the_last_one_too(running):
    done = running.metric("paged_generation_tokens_total", "tiny")
    with running.streaming("tiny"):
        with running.streaming("tiny"):
            until(lambda: running.metric("paged_requests_running", "tiny") == 2)
            assert running.metric("paged_kv_cache_usage", "tiny") > 0
        until(lambda: running.metric("paged_requests_running", "tiny") == 1)
    until(lambda: running.metric("paged_requests_running", "tiny") == 0)
    assert running.metric("paged_kv_cache_usage", "tiny") == 0
    assert running.metric("paged_generation_tokens_total", "tiny") - done < 2 * 1900


def kept_blocks(running: Running, prompt: str) -> int:
    """Of the prompt's full blocks (8 tokens), those whose entries are in the folder of "tiny"."""
    files = [path.read_bytes() for path in running.kept.glob("*.kv")]
    tokens = tiny_folder.byte_tokenizer().encode(prompt)
    entries = [struct.pack("<8q", *tokens[at : at + 8]) for at in range(0, len(tokens) - 7, 8)]
    return sum(any(entry in file for file in files) for entry in entries)


def test_a_killed_worker_is_replaced_and_its_clients_hear_of_it(running, stock):
    """Its successor finds on disk what it had computed: TorchServe leaves no worker the time to save anything."""
    prompt = "What a worker has computed outlives it, if it had a second to spare."
    told = running.post("tiny", json={"prompt": prompt, "max_new_tokens": 9}).text
    until(lambda: kept_blocks(running, prompt) == len(prompt) // 8)
    loaded = running.metric("paged_external_prefix_cache_hits_total", "tiny")
    heard: list[str] = []

    def read() -> None:
        try:
            with running.streaming("tiny") as pieces:
                started.release()
                list(pieces)
        except httpx2.TransportError as error:
            heard.append(str(error))

    started = threading.Semaphore(0)
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert started.acquire(timeout=30)
    before = running.worker("tiny")["pid"]
    os.kill(before, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert len(heard) == 3
    assert running.post("narrow", json={"prompt": "Hello", "max_new_tokens": 9}).text == stock("Hello", 9)

    def replaced() -> bool:
        worker = running.worker("tiny")
        return worker["status"] == "READY" and worker["pid"] != before

    until(replaced, READY_S)
    assert running.post("tiny", json={"prompt": prompt, "max_new_tokens": 9}).text == told
    until(lambda: running.metric("paged_external_prefix_cache_hits_total", "tiny") >= loaded + 64)
    assert running.post("tiny", json={"prompt": "Hello", "max_new_tokens": 9}).text == stock("Hello", 9)


def test_clients_of_a_worker_that_is_scaled_away_hear_of_it_when_there_is_another(running, stock):
    """TorchServe closes connections, or keeps requests for the next worker: their bodies it hands over only once."""
    bodies = {"tiny": LONG, "tiny/1.0/v1/completions": {"prompt": "a", "max_tokens": 1900, "stream": True}}
    heard: dict[str, str] = {}
    started = threading.Semaphore(0)

    def read(path: str) -> None:
        try:
            with running.streaming(path, bodies[path]) as pieces:
                started.release()
                heard[path] = b"".join(pieces).decode()[-200:]
        except httpx2.TransportError:
            heard[path] = "ask again"

    for _ in range(5):  # an answer may have ended before the worker went: then it is asked once more
        threads = [
            threading.Thread(target=read, args=[path]) for path in bodies if "ask again" not in heard.get(path, "")
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert started.acquire(timeout=30)
        for count in ("0", "1"):
            scale = {"min_worker": count, "max_worker": count, "synchronous": "true"}
            scaled = running.client.put(f"{running.management}/models/tiny", params=scale, timeout=READY_S)
            assert scaled.status_code == 200
        for thread in threads:
            thread.join(READY_S)
            assert not thread.is_alive(), "a client of the worker that went waits for ever"
        if all("ask again" in heard[path] for path in bodies):
            break
    assert {path: "ask again" in told for path, told in heard.items()} == dict.fromkeys(bodies, True)
    assert running.post("tiny", json={"prompt": "Hello", "max_new_tokens": 9}).text == stock("Hello", 9)


# ---- models come and go ----------------------------------------------------------------------------------------


def test_a_second_version_whose_archive_holds_the_handler_as_a_file_comes_and_goes(running, tmp_path, stock):
    model = tiny_folder.save(tmp_path / "model", seed=5)
    config = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\nmaxBatchDelay: 1\ncontinuousBatching: true\n"
    config += "paged:\n  attention_backend: reference\n  kv_cache_bytes: 3000000\n  return_full_text: false\n"
    handler = Path(paged_torchserve.handler.__file__)
    archive = stock_archive(tmp_path, "other", model, handler, config)
    register = {"url": archive.name, "model_name": "narrow", "initial_workers": "1", "synchronous": "true"}
    (running.server.workdir / "model-store" / archive.name).symlink_to(archive)
    added = running.client.post(f"{running.management}/models", params=register, timeout=READY_S)
    assert added.status_code == 200
    body = {"prompt": "Hello", "max_new_tokens": 9}
    first, second = running.post("narrow/2.0", json=body).text, running.post("narrow/1.0", json=body).text
    assert first == stock("Hello", 9) != second
    assert len(second) > 5
    assert running.client.delete(f"{running.management}/models/narrow/1.0").status_code == 200
    assert running.post("narrow/1.0", json=body).status_code == 404
    assert running.post("narrow/2.0", json=body).text == first


def test_metrics_are_those_of_the_engine_and_no_step_is_a_line_of_the_log(running):
    for name in ("paged_prompt_tokens_total", "paged_generation_tokens_total", "paged_requests_succeeded_total",
                 "paged_time_to_first_token_seconds_sum", "paged_inter_token_latency_seconds_count"):  # fmt: skip
        assert running.metric(name, "tiny") > 0, name
    tokens = running.metric("paged_generation_tokens_total", "tiny")
    assert tokens > 1000
    lines = [line for line in running.server.log.read_text().splitlines() if "ACCESS_LOG" not in line]
    assert len(lines) < tokens / 2

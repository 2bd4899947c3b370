"""``paged ray serve`` on a real local Ray: one cluster, two replicas of a tiny model, for all tests here.

The last test kills a replica.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

import tiny_folder
from free_ports import free_ports
from paged_ray import commands
from places import ROOT
from ray_cluster import Cluster, ray_cluster
from trial_processes import trial_processes

LIMIT_S = 600.0
ENGINE = ["--max-model-len", "1024", "--kv-bytes", "8M", "--attention-backend", "reference"]


class Running:
    def __init__(self, cluster: Cluster, url: str, folder: Path) -> None:
        self.cluster, self.address, self.folder = cluster, cluster.address, folder
        self.client = httpx2.Client(base_url=url, timeout=LIMIT_S, trust_env=False)

    def complete(self, prompt: str, **options: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **options}
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str) -> dict[str, float]:
        """By replica."""
        page = self.client.get("/metrics").text
        return {
            re.search(r'replica="(\w+)"', line)[1]: float(line.rsplit(" ", 1)[1])
            for line in page.splitlines()
            if line.startswith(name + "{") and 'model_name="tiny"' in line
        }


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tiny_folder.save(tmp_path_factory.mktemp("tiny"))
    (port,) = free_ports(1)
    with ray_cluster() as cluster:
        command = [*serve(folder, cluster.address), "--port", str(port), "--served-model-name", "tiny",
                   "--cpus-per-replica", "0.5", *ENGINE]  # fmt: skip
        log = folder / "log"
        with log.open("wb") as written:
            process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
        try:
            until(lambda: b"serving tiny on" in log.read_bytes() or process.poll() is not None)
            assert process.poll() is None, log.read_text()[-5000:]
            running = Running(cluster, f"http://127.0.0.1:{port}", folder)
            with running.client:
                yield running
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0, log.read_text()[-5000:]
        finally:
            process.kill()
            process.wait()


def serve(folder: Path, address: str) -> list[str]:
    return [sys.executable, "-m", "paged_ray", "serve", str(folder), "--replicas", "2", "--address", address]


def until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


def test_the_routes_of_both_protocols_answer_as_one_engine_does(running):
    from paged_core import LLM, SamplingParams

    expected = LLM(str(running.folder), max_model_len=1024, attention_backend="reference").generate(
        ["Hello there"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    )
    text = expected[0].outputs[0].text
    assert running.complete("Hello there")["choices"][0]["text"] == text
    parameters = {"max_new_tokens": 4, "do_sample": False}
    generated = running.client.post("/generate", json={"inputs": "Hello there", "parameters": parameters})
    assert generated.json()["generated_text"] == text
    assert [model["id"] for model in running.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert running.client.get("/health").status_code == 200
    wrong = running.client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "temperature": -1})
    assert wrong.status_code == 400 and "temperature" in wrong.json()["error"]["message"]
    assert running.client.get("/nothing").status_code == 404


def test_replicas_have_what_the_first_grammar_needs_before_they_serve(running):
    assert len(trial_processes(running.cluster.head)) == 2
    told = running.complete("Hello", max_tokens=9, ignore_eos=False, guided_regex="a{3}b")
    assert told["choices"][0]["text"] == "aaab"


def test_a_field_that_nobody_knows_is_left_out_and_named_as_by_one_server(running):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "made_up": 1}
    answer = running.client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "made_up")


def test_a_stream_comes_in_pieces_and_ends_as_openai_clients_expect(running):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "stream": True,
            "ignore_eos": True}  # fmt: skip
    with running.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]" and len(events) > 3
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


def test_requests_go_where_their_beginning_is_and_salts_keep_tenants_apart(running):
    beginnings = [letter * 200 for letter in "pqrs"]
    before = running.metric("vllm:prefix_cache_hits_total")
    for number in range(4):
        for beginning in beginnings:
            running.complete(f"{beginning}{number}")
    hits = sum(running.metric("vllm:prefix_cache_hits_total").values()) - sum(before.values())
    assert hits == 4 * 3 * 200, "each beginning is computed once, wherever"
    running.complete(beginnings[0], cache_salt="another")
    assert sum(running.metric("vllm:prefix_cache_hits_total").values()) - sum(before.values()) == hits


def test_metrics_tell_of_every_replica(running):
    assert len(running.metric("vllm:num_requests_running")) == 2
    assert running.client.get("/metrics").text.count("# TYPE vllm:num_requests_running ") == 1


def test_the_articles_two_actors_answer_as_the_docs_show(running):
    (block,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/ray.md").read_text(encoding="utf-8"), re.M | re.S)
    assert "@ray.remote" in block
    code = block.replace('"smollm2"', repr(str(running.folder)))
    environment = os.environ | {"RAY_ADDRESS": running.address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("->") == 4


def test_more_than_the_cluster_has_room_for_is_told_in_a_sentence(running):
    command = [*serve(running.folder, running.address), "--cpus-per-replica", "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "lower --replicas or --cpus-per-replica, or add nodes" in done.stderr.splitlines()[-1]


def test_options_that_contradict_each_other_are_told_in_a_sentence(running, capsys):
    _, _, _, *arguments = serve(running.folder, running.address)
    assert commands.main([*arguments, "--max-replicas", "1"]) == 2
    assert "max_replicas (1) is below replicas (2)" in capsys.readouterr().err.splitlines()[-1]


def test_a_killed_replica_costs_its_own_streams_only_and_comes_back(running):
    names = running.metric("vllm:num_requests_running").keys()
    streams = [Stream(running, number) for number in range(8)]
    until(lambda: all(stream.num_events > 2 for stream in streams))
    engines = [pid for pid in running.cluster.processes() if re.search("paged[:#]engines", title(pid))]
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    for stream in streams:
        stream.join(LIMIT_S)
    told = [stream.error for stream in streams]
    assert any(told) and not all(told), "both replicas had streams, and one died"
    assert all(error is None or "has died" in error for error in told)
    assert {stream.last for stream in streams} == {"[DONE]"}
    for number in range(4):  # nobody else notices
        running.complete(f"after {number}")
    until(lambda: len(running.metric("vllm:num_requests_running")) == 2)
    assert running.metric("vllm:num_requests_running").keys() != names


class Stream(threading.Thread):
    """A client that reads a long answer."""

    def __init__(self, running: Running, number: int) -> None:
        super().__init__(daemon=True)
        self._client, self._prompt = running.client, f"{number} stream"
        self.num_events, self.error, self.last = 0, None, ""
        self.start()

    def run(self) -> None:
        body = {"model": "tiny", "prompt": self._prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line:
                    self.num_events += 1
                    self.last = line.removeprefix("data: ")
                    if '"error"' in line:
                        self.error = line


def title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""

"""``paged serve`` as its users start and stop it: a process of its own, a real model, a real signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from free_ports import free_ports
from http_server import until
from trial_processes import trial_processes

START_LIMIT_S = 240


class Process:
    def __init__(self, log: Path, *options: str) -> None:
        (self.port,) = free_ports(1)
        command = [sys.executable, "-m", "paged_openai", "--model", "smollm2", "--port", str(self.port), *options]
        self.log = log
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, client: httpx2.Client) -> None:
        def ready() -> bool:
            assert self._process.poll() is None, self.log.read_text()
            try:
                return client.get("/ready").status_code == 200
            except httpx2.TransportError:
                return False

        until(ready, START_LIMIT_S)

    def terminate(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(60)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("serve") / "log"
    kept = log.parent / "kv"
    process = Process(
        log, "--max-model-len", "512", "--kv-bytes", "50000000", "--shutdown-timeout", "0.5",
        "--attention-backend", "reference", "--served-model-name", "smollm2",
        "--kv-disk", str(kept), "--kv-disk-bytes", "300M",
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()


def test_a_real_model_is_served_until_a_signal_comes(process: Process) -> None:
    url = f"http://127.0.0.1:{process.port}"
    with (
        httpx2.Client(base_url=url, timeout=60, trust_env=False) as raw,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        process.wait_until_ready(raw)
        assert len(trial_processes(process.pid)) == 1, "the first grammar would hold streams up"
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model="smollm2", messages=question, max_tokens=9, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        pieces = client.chat.completions.create(
            model="smollm2", messages=question, max_tokens=9, temperature=0, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert streamed == answer.choices[0].message.content
        assert "vllm:cache_config_info{" in raw.get("/metrics").text
        generated = raw.post(
            "/generate", json={"inputs": "One, two", "parameters": {"details": True, "max_new_tokens": 8}}
        )
        details = generated.json()["details"]
        assert "".join(t["text"] for t in details["tokens"] if not t["special"]) == generated.json()["generated_text"]
        assert (
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="smollm2"}'
            in raw.get("/metrics").text
        )
        assert [tier["name"] for tier in raw.get("/live").json()["tiers"]] == ["disk"]

        body = {"prompt": "Once upon a time", "max_tokens": 400, "stream": True, "ignore_eos": True}
        with raw.stream("POST", "/v1/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            statuses: list[int] = []
            ender = threading.Thread(target=lambda: statuses.append(process.terminate()))
            ender.start()
            *_, error, done = lines
        ender.join()
    assert "shutting down" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    assert statuses == [0]
    log = [json.loads(line) for line in process.log.read_text().splitlines()]  # and nothing between them
    (told,) = [line for line in log if line["message"] == "serving"]
    assert (told["model"], told["dtype"]) == ("smollm2", "float32")
    assert told["url"] == f"http://127.0.0.1:{process.port}"
    assert (told["attention_backend"], told["max_model_len"]) == ("reference", 512)
    assert 0 < told["kv_bytes"] <= 51_000_000 and told["kv_tokens"] > 512
    assert any(line["message"] == "request" and line["path"] == "/generate" for line in log)
    assert "France" not in process.log.read_text()
    kept = process.log.parent / "kv"
    assert sum(path.stat().st_size for path in kept.glob("*.kv")) > 1_000_000, "the next process finds nothing"

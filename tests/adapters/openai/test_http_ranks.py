"""``paged serve --tensor-parallel-size 2`` as its users start and lose it: real processes, and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import tiny_folder
from free_ports import free_ports
from http_server import until

START_LIMIT_S = 240


class Served:
    """A server of a tiny model on two ranks."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.log = folder / "log"
        command = [
            sys.executable, "-m", "paged_openai", "--model", str(folder), "--port", str(port),
            "--served-model-name", "tiny", "--tensor-parallel-size", "2", "--kv-bytes", "1000000",
            "--attention-backend", "reference",
        ]  # fmt: skip
        with self.log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

    def get(self, path: str) -> int:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get(path).status_code
        except httpx2.TransportError:
            return 0

    def complete(self, **fields: Any) -> httpx2.Response:
        body = {"model": "tiny", "prompt": "a prompt", "temperature": 0, "max_tokens": 8, **fields}
        return self.client.post("/v1/completions", json=body)

    def ranks(self) -> list[int]:
        """The processes of its other ranks."""
        if self.process.poll() is not None:
            return []
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if "follower" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tiny_folder.save(tmp_path))
    try:
        until(lambda: served.get("/ready") == 200, START_LIMIT_S)
        yield served
    finally:
        served.process.kill()
        served.process.wait(60)
        served.client.close()


def test_a_server_answers_over_two_ranks_and_says_while_idle_that_one_has_died(served: Served) -> None:
    answer = served.complete()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert served.get("/health") == 200
    (rank,) = served.ranks()
    os.kill(rank, signal.SIGKILL)
    until(lambda: served.get("/health") == 503, 10)
    assert f"rank 1 (process {rank}) was killed by signal 9" in served.client.get("/health").text
    assert served.complete().status_code == 503
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert served.ranks() == []

"""Many clients that submit and leave in a loop: a neighbour's answer comes whole, the queue stays as long as it may be,
and whoever is refused is told when to come back."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from alphabet_model import AlphabetModel
from http_server import LIMIT_S, Running, alphabet_server, until
from paged_core import EngineConfig

NUM_CLIENTS = 10
MAX_RUNNING, MAX_QUEUE = 2, 3
MAX_REQUESTS = 2 * (MAX_RUNNING + MAX_QUEUE)  # as paged serve has it: those that leave count until the engine has heard
LONG = {"prompt": "!", "max_tokens": 90, "ignore_eos": True, "temperature": 0, "stream": True}
BODIES = {
    "/v1/completions": {**LONG, "max_tokens": 200},
    "/generate_stream": {"inputs": "!", "parameters": {"max_new_tokens": 200}},
}
BUSY = {"/v1/completions": 503, "/generate_stream": 429}


class Flood:
    """What came of its requests, all clients together."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._told: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.over = threading.Event()

    def __getitem__(self, outcome: str) -> int:
        with self._lock:
            return self._told[outcome]

    @property
    def outcomes(self) -> set[str]:
        with self._lock:
            return set(self._told)

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.over.is_set():
            told = self._ask(rng.choice(list(BODIES)), rng.choice(["at once", "told of the status", "after an event"]))
            with self._lock:
                self._told[told] += 1

    def _ask(self, path: str, leaves: str) -> str:
        body = json.dumps(BODIES[path]).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", self._port), timeout=LIMIT_S) as raw, raw.makefile("rb") as answer:
            raw.sendall(head + body)
            if leaves == "at once":
                return "left"
            status = int(answer.readline().split()[1])
            if status != 200:
                return _refused(path, status, answer.read(2000).lower())
            while leaves == "after an event" and not answer.readline().startswith(b"data: {"):
                pass
            return "left"


def _refused(path: str, status: int, rest: bytes) -> str:
    """Either "refused" or what is wrong with the refusal."""
    is_clear = status == BUSY[path] and b"\nretry-after: 1\r" in rest and b"try again soon" in rest
    return "refused" if is_clear else f"{path}: {status} {rest!r}"


@contextmanager
def flood(server: Running) -> Iterator[Flood]:
    flood = Flood(server.port)
    threads = [threading.Thread(target=flood.run, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield flood
    finally:
        flood.over.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads)


def test_a_flood_of_clients_who_submit_and_leave_harms_no_neighbour() -> None:
    config = EngineConfig(num_blocks=512, max_num_seqs=MAX_RUNNING, attention_backend="reference")
    model = AlphabetModel(lambda token_ids: time.sleep(0.01))  # so that the neighbour's answer outlasts many requests
    with alphabet_server(model, config=config, max_queue=MAX_QUEUE, max_requests=MAX_REQUESTS) as server:
        with (
            server.client() as watcher,
            server.client() as client,
            client.stream("POST", "/v1/completions", json=LONG) as response,
        ):
            events = response.iter_lines()
            text = _text(next(events))
            with flood(server) as told:
                seen = [(_text(event), _num_requests(watcher)) for event in events if event.startswith("data: {")]
                meanwhile = told["refused"], told["left"]
                until(lambda: (told["refused"] > 50 and told["left"] > 50) or told.outcomes > {"refused", "left"})
        assert text + "".join(piece for piece, _ in seen) == "".join(map(chr, range(ord('"'), ord('"') + 90)))
        assert min(meanwhile) > 0, "the flood came when the neighbour was done"
        assert max(num for _, num in seen) <= MAX_REQUESTS
        assert told.outcomes == {"refused", "left"}
        server.come_to_rest()


def _text(event: str) -> str:
    (choice,) = json.loads(event.removeprefix("data: "))["choices"]
    return str(choice["text"])


def _num_requests(client: httpx2.Client) -> int:
    """That the engine knows of: they run or wait."""
    told: dict[str, Any] = client.get("/live").json()
    return int(told["running"] + told["waiting"])

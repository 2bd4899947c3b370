"""Clients' view while replicas are added and removed: one replica, four under load, then one again.

    python benchmarks/bench_ray.py MODEL [--clients 24] [--json PATH]

Starts a Ray of its own with four replicas at most. Clients stream answers one after another: many of them until four
replicas run, then two of them until one is left. Errors and incomplete streams are counted.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

_BODY = {"max_tokens": 120, "temperature": 0, "ignore_eos": True, "stream": True}
_FEW = 2
_LOOK_S = 1.0


class Clients:
    """Threads that stream answers, as many as are wanted."""

    def __init__(self, url: str, model: str) -> None:
        self.counts: Counter[str] = Counter()
        self.wanted = 0
        self._url, self._model = url, model
        self._threads: list[threading.Thread] = []

    def want(self, num: int) -> None:
        self.wanted = num
        while len(self._threads) < num:
            number = len(self._threads)
            self._threads.append(threading.Thread(target=self._run, args=(number,), daemon=True))
            self._threads[-1].start()

    def join(self) -> None:
        self.wanted = 0
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx2.Client(base_url=self._url, timeout=600, trust_env=False) as client:
            turn = 0
            while number < self.wanted:
                turn += 1
                body = {**_BODY, "model": self._model, "prompt": f"Client {number} asks for the {turn}. time:"}
                self.counts[self._stream(client, body)] += 1

    def _stream(self, client: httpx2.Client, body: dict[str, Any]) -> str:
        last, failed = "", False
        try:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    return f"status {answer.status_code}"
                for line in answer.iter_lines():
                    failed = failed or '"error"' in line
                    last = line or last
        except httpx2.HTTPError as error:
            return f"cut: {type(error).__name__}"
        return "error event" if failed else "whole" if last == "data: [DONE]" else "without its last word"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=24, help="while there is much to do (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each change (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import ray
    from ray import serve

    from paged_ray import build_app

    ray.init("local", num_cpus=4, include_dashboard=False)
    try:
        serve.start(http_options={"port": args.port})
        app = build_app(args.model, names=["m"], replicas=1, max_replicas=4, target_requests=4, scale_up_s=2,
                        scale_down_s=5, cpus_per_replica=0.5, drain_s=300)  # fmt: skip
        serve.run(app, name="paged")
        found = _measure(f"http://127.0.0.1:{args.port}", args.clients, args.limit, serve)
    finally:
        serve.shutdown()
        ray.shutdown()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _measure(url: str, num_clients: int, limit_s: float, serve: Any) -> dict[str, Any]:
    clients = Clients(url, "m")
    seconds = {}
    for name, wanted, num_replicas in (("up", num_clients, 4), ("down", _FEW, 1)):
        began = time.monotonic()
        clients.want(wanted)
        while _num_replicas(serve) != num_replicas and time.monotonic() - began < limit_s:
            time.sleep(_LOOK_S)
        seconds[name] = round(time.monotonic() - began, 1)
        assert _num_replicas(serve) == num_replicas, f"{num_replicas} replicas were not reached in {limit_s:g} s"
    clients.join()
    return {"streams": dict(clients.counts), "seconds": seconds}


def _num_replicas(serve: Any) -> int:
    """The number of running replicas; starting and stopping ones don't count, but none may be stopping when one is
    expected."""
    states = serve.status().applications["paged"].deployments["engines"].replica_states
    return int(sum(states.values())) if set(states) <= {"RUNNING"} else -1


if __name__ == "__main__":
    main()

"""A server's memory over thousands of requests, and what its clients see when it is killed.

    python benchmarks/bench_reliability.py memory MODEL --requests 10000
    python benchmarks/bench_reliability.py kill MODEL --clients 16

MODEL is whatever ``paged serve`` takes. The requests are of all kinds: whole answers, streams, several samples, clients
that leave in the middle, bodies that are refused.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil

_READY_S = 300.0
_LONG = 1900  # tokens of an answer that is still under way when its client or its server goes


class Seen(NamedTuple):
    """What one client saw of a stream."""

    num_events: int
    end: str  # "[DONE]", or the error that its reading ended with
    at: float  # time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "kill"])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = measure_memory(args) if args.what == "memory" else measure_kill(args)
    print(json.dumps(result, indent=2))
    return 0


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """The resident memory of the server's process, ten times on the way."""
    tenth = max(args.requests // 10, 1)
    with serving(args.model) as (process, port), ThreadPoolExecutor(args.clients) as pool:
        told: Counter[str] = Counter()
        rss_mb = [_rss_mb(process)]
        began = time.monotonic()
        for first in range(0, args.requests, tenth):
            seeds = [f"{args.seed}.{number}" for number in range(first, first + tenth)]
            told.update(pool.map(lambda seed: ask(port, random.Random(seed)), seeds))
            rss_mb.append(_rss_mb(process))
            print(f"{first + tenth}: {rss_mb[-1]} MB", file=sys.stderr, flush=True)
        seconds = round(time.monotonic() - began)
    return {"requests": told.total(), "answers": dict(told), "rss_mb": rss_mb, "seconds": seconds}


def measure_kill(args: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL while every client reads a stream: how each stream ended, and when; when the next server answers."""
    with serving(args.model) as (process, port), ThreadPoolExecutor(args.clients) as pool:
        streams = [pool.submit(read_stream, port, _LONG) for _ in range(args.clients)]
        time.sleep(2)
        killed_at = time.monotonic()
        process.send_signal(signal.SIGKILL)
        seen = [stream.result() for stream in streams]
        process.wait()
        with serving(args.model, port):
            again_s = time.monotonic() - killed_at
            after = read_stream(port, 5)
    return {
        "clients": args.clients,
        "events_before": sum(each.num_events for each in seen),
        "ends": Counter(each.end for each in seen),
        "told_after_ms": round(1000 * max(each.at - killed_at for each in seen), 1),
        "next_server_on_the_port_answers_after_s": round(again_s, 1),
        "its_stream_ends_with": after.end,
    }


@contextmanager
def serving(model: str, port: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``paged serve``, in a process of its own."""
    port = port or _free_port()
    command = [sys.executable, "-m", "paged_openai", "--model", model, "--served-model-name", "it", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "error"])
    try:
        _wait_until_ready(process, port)
        yield process, port
    finally:
        process.terminate()
        process.wait(60)


def ask(port: int, rnd: random.Random) -> str:
    """One request of any kind. Returns what came of it."""
    way = rnd.choice(["whole", "stream", "several", "leaves", "refused"])
    body: dict[str, Any] = {"model": "it", "prompt": _prompt(rnd), "max_tokens": rnd.randrange(1, 24)}
    body |= {"several": {"n": 3}, "refused": {"temperature": "hot"}}.get(way, {})
    body |= {"stream": True} if way in ("stream", "leaves") else {}
    connection = _post(port, {**body, "max_tokens": _LONG} if way == "leaves" else body)
    try:
        response = connection.getresponse()
        if way == "leaves":
            response.readline()
            return "left"
        response.read()
        return str(response.status)
    finally:
        connection.close()


def read_stream(port: int, max_tokens: int) -> Seen:
    """A stream, to its end or to that of its server."""
    body = {"model": "it", "prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "stream": True}
    told, end = b"", "an end without [DONE]"
    connection = None
    try:
        connection = _post(port, body)
        told = connection.getresponse().read()
    except http.client.IncompleteRead as error:
        told, end = error.partial, "IncompleteRead"
    except (OSError, http.client.HTTPException) as error:
        end = type(error).__name__
    finally:
        if connection is not None:
            connection.close()
    if told.endswith(b"data: [DONE]\n\n"):
        end = "[DONE]"
    return Seen(told.count(b"data: {"), end, time.monotonic())


def _post(port: int, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _prompt(rnd: random.Random) -> str:
    words: Sequence[str] = ("a", "tale", "of", "two", "rivers", "and", "their", "bridge")
    return " ".join(rnd.choice(words) for _ in range(rnd.randrange(1, 40)))


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit("the server has ended")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise SystemExit(f"the server is not ready after {_READY_S:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rss_mb(process: subprocess.Popen[bytes]) -> int:
    return int(psutil.Process(process.pid).memory_info().rss) // 1_000_000


if __name__ == "__main__":
    sys.exit(main())

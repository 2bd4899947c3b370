"""Whom bench_reliability.py sends to a ``paged serve`` in a process of its own: honest clients, and others."""

from __future__ import annotations

import http.client
import itertools
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

_READY_S = 300.0
LONG = 1900  # tokens of an answer that is still under way when its client or its server goes
BOMB = {"type": "integer", "multipleOf": 99999989}
# (port, how much, an event that ends it, a queue: for a word when it has begun, and for its Counter)
Trouble = Callable[[int, float, Any, Any], None]


class Seen(NamedTuple):
    """What one client saw of a stream."""

    num_events: int  # with text: tokens that come together share one
    num_tokens: int  # as the server counts them at the end
    end: str  # "[DONE]", or the error that its reading ended with
    at: float  # time.monotonic(), of the end
    first_ms: float  # until the first event
    gaps_ms: Sequence[float]  # between two


@contextmanager
def serving(
    model: str, port: int | None = None, options: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``paged serve``, in a process of its own."""
    port = port or _free_port()
    command = [sys.executable, "-m", "paged_openai", "--model", model, "--served-model-name", "it", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "error", *options])
    try:
        _wait_until_ready(process, port)
        yield process, port
    finally:
        process.terminate()
        process.wait(60)


# ---- honest ones ---------------------------------------------------------------------------------------------------


def ask(port: int, rnd: random.Random) -> str:
    """One request of any kind. Returns what came of it."""
    way = rnd.choice(["whole", "stream", "several", "leaves", "refused"])
    body: dict[str, Any] = {"model": "it", "prompt": _prompt(rnd), "max_tokens": rnd.randrange(1, 24)}
    body |= {"several": {"n": 3}, "refused": {"temperature": "hot"}}.get(way, {})
    body |= {"stream": True} if way in ("stream", "leaves") else {}
    connection = _post(port, {**body, "max_tokens": LONG} if way == "leaves" else body)
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
    body = {"model": "it", "prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
    began, events, end = time.monotonic(), list[tuple[float, bytes]](), "an end without [DONE]"
    connection = None
    try:
        connection = _post(port, body)
        for line in _lines(connection.getresponse()):
            if line.startswith(b"data: {"):
                events.append((time.monotonic(), line.removeprefix(b"data: ")))
            elif line.startswith(b"data: [DONE]"):
                end = "[DONE]"
    except (OSError, http.client.HTTPException) as error:
        end = type(error).__name__
    finally:
        if connection is not None:
            connection.close()
    usage = (json.loads(events.pop()[1]).get("usage") if end == "[DONE]" else None) or {}
    times = [at for at, _ in events]
    return Seen(
        num_events=len(events),
        num_tokens=usage.get("completion_tokens", 0),
        end=end,
        at=time.monotonic(),
        first_ms=1000 * (times[0] - began) if times else 0.0,
        gaps_ms=[1000 * (after - before) for before, after in itertools.pairwise(times)],
    )


def probe(port: int) -> dict[str, float]:
    """Milliseconds that a look at /health and a completion of one token take, each over a connection of its own."""
    waits = {}
    for name, ask_for in {"health": _get_health, "completion": _post_small}.items():
        began = time.monotonic()
        connection = ask_for(port)
        try:
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{name}: status {response.status}")
        waits[name] = 1000 * (time.monotonic() - began)
    return waits


def _get_health(port: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    return connection


def _post_small(port: int) -> http.client.HTTPConnection:
    return _post(port, {"model": "it", "prompt": "Once", "max_tokens": 1, "temperature": 0})


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """As they come. (``readline`` takes the end of a connection for that of the answer.)"""
    rest = b""
    while piece := response.read1():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


# ---- those that mean harm ------------------------------------------------------------------------------------------


@contextmanager
def beside(trouble: Trouble, port: int, how_much: float) -> Iterator[Counter[str]]:
    """``trouble`` from a process of its own for as long as the block lasts; what came of its requests is told then."""
    context = multiprocessing.get_context("spawn")
    over, outcomes = context.Event(), context.Queue()
    process = context.Process(target=trouble, args=(port, how_much, over, outcomes))
    told: Counter[str] = Counter()
    process.start()
    try:
        outcomes.get(timeout=_READY_S)  # it is at it
        yield told
    finally:
        over.set()
        told.update(outcomes.get())
        process.join()


def flood(port: int, num_clients: float, over: Any, outcomes: Any) -> None:
    """Clients that submit and leave in a loop: at once, or after a first event."""

    def client(seed: int) -> Counter[str]:
        rnd, told = random.Random(seed), Counter[str]()
        while not over.is_set():
            told[_submit_and_leave(port, rnd)] += 1
        return told

    with ThreadPoolExecutor(int(num_clients)) as pool:
        outcomes.put("begun")
        outcomes.put(sum(pool.map(client, range(int(num_clients))), Counter[str]()))


def bombs(port: int, per_second: float, over: Any, outcomes: Any) -> None:
    """Schemas and expressions that take seconds to compile, by turns. Each is another: nobody has refused it yet."""
    with ThreadPoolExecutor(64) as pool:
        sent = [pool.submit(_send_bomb, port, 0)]
        outcomes.put("begun")
        for number in itertools.count(1):
            if over.wait(1 / per_second):
                break
            sent.append(pool.submit(_send_bomb, port, number))
        outcomes.put(Counter(each.result() for each in sent))


def _submit_and_leave(port: int, rnd: random.Random) -> str:
    connection = _post(port, {"model": "it", "prompt": _prompt(rnd), "max_tokens": LONG, "stream": True})
    try:
        if rnd.random() < 0.5:
            return "left at once"
        response = connection.getresponse()
        response.readline()
        return "left after an event" if response.status == 200 else f"refused: {response.status}"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def _send_bomb(port: int, number: int) -> str:
    own = f"{os.getpid()}.{number}"  # of a later round, too
    expression = {"guided_regex": f"({own})?((a{{1000}}){{1000}}){{1000}}"}
    bomb = expression if number % 2 else {"guided_json": {"title": own, **BOMB}}
    connection = _post(port, {"model": "it", "prompt": "1", **bomb})
    try:
        return str(connection.getresponse().status)
    finally:
        connection.close()


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

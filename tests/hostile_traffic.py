"""Traffic that no honest client sends, against a real server: bodies drawn from its OpenAPI document by schemathesis,
and the bytes of hostile_bytes. All of it comes from one seed.

    python tests/hostile_traffic.py [--requests 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from jsonschema_rs import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core import NotSet

from alphabet_model import AlphabetModel
from hostile_bytes import Progress, hostile_bytes, silent
from http_server import Running, alphabet_server, until
from paged_core import EngineConfig
from paged_openai.app import AppOptions
from paged_serving import RequestLimits
from toy_tokenizers import ByteTokenizer

_CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
           "allow_header_conformance")  # fmt: skip
_PATIENCE_S = 120  # to wait for an answer on a busy machine
_KEPT = 4  # optional fields that stay in a thinned body
_LEAST = {"prompt": "A", "messages": [{"role": "user", "content": "A"}], "inputs": "A", "tokens": [33], "input": "A"}


@contextmanager
def watched_server() -> Iterator[Running]:
    """A server with a tiny model. If it logs an error, the block fails at its end."""
    log = _Errors()
    for name in ("paged_openai", "paged_core", "uvicorn", "asyncio"):
        logging.getLogger(name).addHandler(log)
    try:
        tokenizer = ByteTokenizer()  # it can spell everything that a grammar allows
        with alphabet_server(
            AlphabetModel(vocab_size=tokenizer.size),
            tokenizer=tokenizer,
            config=EngineConfig(num_blocks=512, attention_backend="reference"),
            limits=RequestLimits(max_n=4, max_tokens=40),
            options=AppOptions(body_timeout_s=5, max_body_bytes=200_000),
        ) as server:
            yield server
    finally:
        for name in ("paged_openai", "paged_core", "uvicorn", "asyncio"):
            logging.getLogger(name).removeHandler(log)
    assert not log.lines, log.lines[:3]


def schema_driven(server: Running, num_requests: int, draw_seed: int, progress: Progress = silent) -> Counter[int]:
    """Send bodies that fit the document, bodies that don't, and thinned ones that mostly get answers. Returns how often
    each status came.

    Raises:
        Failure or FailureGroup of schemathesis: an answer that the document rules out.
    """
    load_all_checks()
    checks = CHECKS.get_by_names(list(_CHECKS))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    fitting = {path: Draft202012Validator(_body_schema(routes)) for path, routes in schema.raw_schema["paths"].items()}
    kinds = [(operation.ok(), mode) for operation in schema.get_all_operations() for mode in GenerationMode]
    kinds = [(operation, mode) for operation, mode in kinds if operation.method == "post" and list(operation.body)]
    share = -(-num_requests // len(kinds))
    statuses: Counter[int] = Counter()
    with requests.Session() as session:
        session.trust_env = False
        for operation, mode in kinds:
            rng = random.Random(f"{draw_seed} {operation.label} {mode}")

            def send(case: Any, mode: GenerationMode = mode, rng: random.Random = rng) -> None:
                if mode is GenerationMode.POSITIVE and rng.random() < 0.7:
                    case.body = _thinned(case.body, rng)
                response = case.call(base_url=server.url, session=session, timeout=_PATIENCE_S)
                case.validate_response(response, checks=checks)
                told = response.status_code == 200 and not isinstance(case.body, NotSet)
                fits = fitting[case.operation.path].is_valid(case.body) if told else True
                assert fits, ("the document forbids it, and yet it was taken", case.body)
                statuses[response.status_code] += 1
                progress(statuses.total())

            _draw(operation.as_strategy(generation_mode=mode), share, draw_seed, send)
    return statuses


def see_that_nothing_is_left(server: Running) -> None:
    """Assert that all blocks are free, nothing is open, no connection is left, and honest clients get the right
    answer."""
    server.come_to_rest()
    state = server.server.server_state
    until(lambda: not state.connections and not state.tasks)
    with server.client() as client:
        body = {"prompt": "A", "max_tokens": 3, "temperature": 0}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "BCD"
        streamed = client.post("/v1/completions", json={**body, "stream": True}).text
        assert streamed.count('"finish_reason":"length"') == 1
        assert client.post("/generate", json={"inputs": "A"}).status_code == 200
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    until(lambda: not state.connections)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


def _body_schema(routes: Any) -> Any:
    body = routes.get("post", {}).get("requestBody", {"content": {"application/json": {"schema": {}}}})
    return body["content"]["application/json"]["schema"]


def _draw(strategy: Any, num: int, draw_seed: int, send: Callable[[Any], None]) -> None:
    @seed(draw_seed)
    @settings(max_examples=num, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def each(case: Any) -> None:
        send(case)

    each()


def _thinned(body: Any, rng: random.Random) -> Any:
    if not isinstance(body, dict):
        return body
    others = [name for name in body if name not in _LEAST and name != "model"]
    kept = {name: body[name] for name in rng.sample(others, min(_KEPT, len(others)))}
    return {name: value for name, value in _LEAST.items() if name in body} | kept


def only_these(num_threads: int) -> bool:
    """Return whether no more than ``num_threads`` threads run. Grammar threads end with the server's objects, which
    refer to one another. A thread that is about to end may hold these for a moment, so the garbage collector is
    called."""
    gc.collect()
    return threading.active_count() <= num_threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def progress(num_done: int) -> None:
        if num_done % 50 == 0:
            print(f"\r{num_done} ", end="", file=sys.stderr, flush=True)

    began, num_threads = time.monotonic(), threading.active_count()
    with watched_server() as server:
        statuses = schema_driven(server, args.requests * 3 // 10, args.seed, progress)
        print(f"\nby schema: {statuses.total()} requests, statuses {dict(sorted(statuses.items()))}")
        attacks = hostile_bytes(server, args.requests - statuses.total(), args.seed, progress)
        print(f"\nby hand: {attacks.total()} connections, {dict(attacks)}")
        see_that_nothing_is_left(server)
    del server  # otherwise it would keep alive what only_these waits for
    until(lambda: only_these(num_threads))
    print(f"no server error, all blocks free, nothing left; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

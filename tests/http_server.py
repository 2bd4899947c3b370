"""A real uvicorn on the loopback device, in a thread, over a model that continues the alphabet."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from alphabet_model import AlphabetModel
from paged_core import AsyncEngine, Engine, EngineConfig
from paged_openai.app import AppOptions, create_app
from paged_openai.connection import ConnectionLimits
from paged_openai.logs import JSONLines
from paged_openai.server import Server
from paged_openai.service import Service
from paged_serving import PrometheusMetrics, RequestLimits, ServedModel
from toy_tokenizers import CharacterTokenizer
from waiting import until

LIMIT_S = 30.0


class Running:
    """One server, and the parts behind it that tests look at."""

    def __init__(self, engine: AsyncEngine, service: Service, server: Server) -> None:
        self.engine, self.service, self.server = engine, service, server
        self._thread = threading.Thread(target=server.run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the server doesn't stop"

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=LIMIT_S, trust_env=False, **options)

    @property
    def num_blocks_used(self) -> int:
        stats = self.engine.engine.last_stats
        return stats.num_blocks_used if stats is not None else 0

    def wait_until_told_to_cancel(self, num_prompts: int = 1) -> None:
        """Wait until the engine has got so many cancellations. Its step is held meanwhile, so that they stay queued."""
        until(lambda: self.engine.num_commands >= num_prompts)

    def come_to_rest(self) -> None:
        """Wait until nothing runs, and assert that nothing is left behind."""
        until(lambda: not self.engine.engine.has_work and not self.service.num_open)
        assert self.engine.submit([33]).result(LIMIT_S).finished, "a step after the last, for its stats"
        until(lambda: self.num_blocks_used == 0)


@contextmanager
def alphabet_server(
    model: AlphabetModel | None = None,
    *,
    tokenizer: Any = None,
    plugins: Sequence[Any] = (),
    config: EngineConfig | None = None,
    limits: RequestLimits | None = None,
    options: AppOptions | None = None,
    max_queue: int = 100,
    timeout_s: float | None = None,
    shutdown_timeout_s: float = 5.0,
    connections: ConnectionLimits | None = None,
    service_options: dict[str, Any] | None = None,
    max_requests: int = 10_000,
    strict_fields: bool = False,
    reasoning: bool | None = None,
    **server_options: Any,
) -> Iterator[Running]:
    metrics = PrometheusMetrics("alphabet")
    config = config or EngineConfig(num_blocks=512, attention_backend="reference")
    with AsyncEngine(
        Engine(model or AlphabetModel(), config, plugins=[metrics, *plugins]),
        tokenizer=tokenizer or CharacterTokenizer(),
        max_requests=max_requests,
    ) as engine:
        served = ServedModel(engine, ["alphabet"], limits, strict_fields=strict_fields, reasoning=reasoning)
        service = Service(engine, served, max_queue=max_queue, timeout_s=timeout_s, **(service_options or {}))
        app = create_app(service, metrics, options)
        server = Server(
            app, service, port=0, shutdown_timeout_s=shutdown_timeout_s, limits=connections, **server_options
        )
        running = Running(engine, service, server)
        running.start()
        try:
            yield running
        finally:
            running.stop()


def request_lines(caplog: Any, num: int) -> list[dict[str, Any]]:
    """Return the log's lines of ``num`` requests, in any order. A line may come a moment after its client has the
    answer."""

    def lines() -> list[dict[str, Any]]:
        records = [record for record in list(caplog.records) if record.message == "request"]
        return [json.loads(JSONLines().format(record)) for record in records]

    until(lambda: len(lines()) >= num)
    return lines()

"""Routes about the server: models, limits, load, health, metrics, OpenAPI document."""

from __future__ import annotations

import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from paged_core import __version__
from paged_openai.openapi import openapi
from paged_openai.prefixes import prefix_of
from paged_openai.responses import OPENAI, TGI, error_response, json_response, large_json_bytes
from paged_openai.service import Service
from paged_serving import CallError, Failure, PrometheusMetrics, ProtocolError


class About:
    """``with_keys``: whether callers need a key, for the document."""

    def __init__(self, service: Service, metrics: PrometheusMetrics | None, *, with_keys: bool) -> None:
        self._service, self._served, self._metrics = service, service.served, metrics
        self._with_keys = with_keys
        self._created = int(time.time())
        self._document: dict[str, Any] | None = None

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card(name) for name in self._served.names]})

    async def model(self, request: Request) -> Response:
        try:
            return json_response(self._card(self._served.check_name(request.path_params["name"])))
        except ProtocolError as error:
            return error_response(OPENAI, error)

    async def info(self, request: Request) -> Response:
        """TGI's."""
        limits, spec = self._served.limits, self._service.engine.engine.spec
        return json_response({
            "model_id": self._served.names[0],
            "model_sha": None,
            "model_dtype": str(spec.dtype),
            "model_device_type": spec.device.type,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": self._service.max_open,
            "max_best_of": limits.max_n,
            "max_stop_sequences": limits.max_stop,
            "max_input_tokens": self._served.max_prompt_tokens,
            "max_input_length": self._served.max_prompt_tokens,
            "max_total_tokens": self._served.max_model_len,
            "router": "paged-core",
            "version": __version__,
            "sha": None,
            "docker_label": None,
        })  # fmt: skip

    async def version(self, request: Request) -> Response:
        """vLLM's form; the number is ours."""
        return json_response({"version": __version__})

    async def load(self, request: Request) -> Response:
        """vLLM's: sequences that are under way, those that wait included."""
        return json_response({"server_load": self._service.num_open})

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document of all routes, with a proxy's prefix if there is one."""
        if self._document is None:
            routes = request.app.routes
            self._document = await run_in_threadpool(openapi, routes, self._served, with_keys=self._with_keys)
        prefix = prefix_of(request.scope)
        document = {**self._document, **({"servers": [{"url": prefix}]} if prefix else {})}
        return Response(await run_in_threadpool(large_json_bytes, document), media_type="application/json")

    async def health(self, request: Request) -> Response:
        """200 while the engine works; otherwise restart the process."""
        return self._status(self._service.trouble)

    async def ready(self, request: Request) -> Response:
        """200 while calls are accepted; otherwise send them elsewhere."""
        return self._status(None if self._service.ready else "the server takes no more calls")

    async def nothing(self, request: Request) -> Response:
        """Refuses routes that need another kind of model."""
        told = f"{request.scope['path']} needs a model that embeds or scores texts; {self._served.names[0]} writes them"
        return error_response(OPENAI, CallError(Failure.NOT_FOUND, told))

    async def metrics(self, request: Request) -> Response:
        if self._metrics is None:
            return error_response(TGI, CallError(Failure.NOT_FOUND, "this server keeps no metrics"))
        body, content_type = await run_in_threadpool(self._metrics.render)
        return Response(body, headers={"content-type": content_type})

    def _status(self, bad: str | None) -> Response:
        return Response(status_code=200) if bad is None else error_response(TGI, CallError(Failure.UNAVAILABLE, bad))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "paged-core",
            "root": self._served.names[0],
            "max_model_len": self._served.max_model_len,
        }

"""The application: replicas with engines, and the ingress in front of them, bound together for ``serve.run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.types import Receive, Scope, Send

from paged_ray.ingress import Ingress
from paged_ray.replica import Replica
from paged_ray.settings import Settings, from_mapping, settings

_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 30.0
_ROUTER = "paged_ray.router:PrefixRouter"


def build_app(model: str, **given: Any) -> Application:
    """An application for ``serve.run``: a model behind all routes of the HTTP adapter.

    Args:
        model: a folder or file that every node has, a hub id, or smollm2.
        given: fields of Settings, of an EngineConfig and of RequestLimits, as docs/ray.md lists them.

    Raises:
        TypeError: there is no such setting.
        ConfigError: a value is out of its range.
    """
    return bind(settings(model, **given))


def build(args: Mapping[str, Any]) -> Application:
    """The same for config files and ``serve run paged_ray:build model=smollm2 replicas=2``.

    Raises:
        ConfigError: no model is named, a setting is unknown, or a value isn't what it must be.
    """
    return bind(from_mapping(args))


def bind(told: Settings) -> Application:
    """The deployments of an application with these settings."""
    scale: dict[str, Any] = {"num_replicas": told.replicas}
    if told.max_replicas is not None:
        scale = {"num_replicas": "auto", "autoscaling_config": AutoscalingConfig(
            min_replicas=told.replicas, max_replicas=told.max_replicas,
            target_ongoing_requests=told.target_requests,
            upscale_delay_s=told.scale_up_s, downscale_delay_s=told.scale_down_s)}  # fmt: skip
    if told.routing == "prefix":
        scale["request_router_config"] = RequestRouterConfig(request_router_class=_ROUTER)
    replicas = serve.deployment(Replica).options(
        name="engines",
        max_ongoing_requests=told.max_ongoing,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=told.drain_s,
        ray_actor_options={"num_cpus": told.cpus_per_replica, "num_gpus": told.gpus_per_replica},
        **scale,
    )
    ingress = serve.deployment(serve.ingress(_ToIngress())(_Holder)).options(
        name="ingress",
        max_ongoing_requests=100 * told.max_ongoing,
        graceful_shutdown_timeout_s=told.drain_s,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(told.of_a_replica), told.of_a_replica)


class _Holder:
    """Holds the ingress: Ray Serve puts its own ``__call__`` into the class of a deployment."""

    def __init__(self, replicas: Any, told: Settings) -> None:
        self.ingress = Ingress(replicas, told)


class _ToIngress:
    """The ASGI application that Ray Serve gets before the ingress exists."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
        else:
            await serve.get_replica_context().servable_object.ingress(scope, receive, send)


async def _answer_lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return

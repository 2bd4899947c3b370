"""Requests by route, for scrapers. What clients make up (paths, methods) must not become series of its own."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import Route
from starlette.types import Scope

from paged_serving import HTTPMetrics, PrometheusMetrics

_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS"})
_NO_ROUTE, _OTHER = "none", "other"


class RouteCounts:
    """``metrics`` has them from now on."""

    def __init__(self, metrics: PrometheusMetrics, routes: Iterable[Route]) -> None:
        self._metrics = HTTPMetrics(metrics)
        self._templates = [route for route in routes if "{" in route.path]
        self._paths = {route.path for route in routes}

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        self._metrics.observe(self._route(scope["path"]), method, status, seconds)

    def _route(self, path: str) -> str:
        if path in self._paths:
            return path
        return next((route.path for route in self._templates if route.path_regex.match(path)), _NO_ROUTE)

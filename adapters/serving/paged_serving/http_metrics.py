"""HTTPMetrics: requests by route and status, under the names that vLLM's dashboards ask for. Knows no framework."""

from __future__ import annotations

from paged_serving.metric_names import HTTP_DURATION, HTTP_REQUESTS
from paged_serving.metrics import PrometheusMetrics

_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds


class HTTPMetrics:
    """Scraped with ``metrics``; one for each of these."""

    def __init__(self, metrics: PrometheusMetrics) -> None:
        import prometheus_client as client  # it is there, or there were no ``metrics``

        registry = metrics.registry
        self._requests = client.Counter(*HTTP_REQUESTS, ("handler", "method", "status"), registry=registry)
        self._duration = client.Histogram(*HTTP_DURATION, ("handler", "method"), buckets=_BUCKETS, registry=registry)

    def observe(self, handler: str, method: str, status: int, seconds: float) -> None:
        """``handler``: the route, which must be one of few: each is a series. ``status``: told as 2xx, 4xx, ..."""
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._duration.labels(handler, method).observe(seconds)

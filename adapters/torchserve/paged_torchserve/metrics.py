"""The engines' metrics, summed, at TorchServe's own endpoint. Every update there is a line of the log, so only changes
are sent, once a second, and times as sums and counts, whose quotient is the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paged_serving import PrometheusMetrics

_GAUGES = {  # sample of PrometheusMetrics -> name at TorchServe, which takes no colons
    "vllm:num_requests_running": "paged_requests_running",
    "vllm:num_requests_waiting": "paged_requests_waiting",
    "vllm:kv_cache_usage_perc": "paged_kv_cache_usage",
}
_COUNTERS = {
    "vllm:prompt_tokens_total": "paged_prompt_tokens_total",
    "vllm:generation_tokens_total": "paged_generation_tokens_total",
    "vllm:num_preemptions_total": "paged_preemptions_total",
    "paged:late_compiles_total": "paged_late_compiles_total",
    "paged:steps_divided_total": "paged_steps_divided_total",
    "vllm:prefix_cache_queries_total": "paged_prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total": "paged_prefix_cache_hits_total",
    "vllm:external_prefix_cache_hits_total": "paged_external_prefix_cache_hits_total",
    "vllm:time_to_first_token_seconds_sum": "paged_time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count": "paged_time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_sum": "paged_inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count": "paged_inter_token_latency_seconds_count",
    "tgi_request_success": "paged_requests_succeeded_total",
}
_MEANS = ("paged_kv_cache_usage",)  # a share: the mean over engines is sent
NAMES = {**dict.fromkeys(_GAUGES.values(), "gauge"), **dict.fromkeys(_COUNTERS.values(), "counter")}
DIMENSIONS = ["ModelName", "Level"]
UNIT = "count"


class TorchServeMetrics:
    """``cache``: TorchServe's, as a worker's context has it; ``sources``: plugins, one of each engine."""

    def __init__(self, model_name: str, cache: Any, sources: Sequence[PrometheusMetrics]) -> None:
        from ts.metrics.metric_type_enum import MetricTypes

        self._sources = sources
        self._labels = [model_name, "Model"]
        self._metrics = {
            name: cache.add_metric_to_cache(
                metric_name=name, unit=UNIT, dimension_names=list(DIMENSIONS), metric_type=MetricTypes(kind)
            )
            for name, kind in NAMES.items()
        }
        self._told: dict[str, float] = {}

    def flush(self) -> None:
        """Send the changed metrics. Callable from any thread, one at a time."""
        for name, now in self._sums().items():
            counted = self._told.get(name, 0.0) if NAMES[name] == "counter" else 0.0
            self._tell(name, now, now - counted)

    def _sums(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for source in self._sources:
            for sample in (sample for family in source.registry.collect() for sample in family.samples):
                name = _GAUGES.get(sample.name) or _COUNTERS.get(sample.name)
                if name is not None:
                    share = 1 / len(self._sources) if name in _MEANS else 1
                    sums[name] = sums.get(name, 0.0) + sample.value * share
        return sums

    def _tell(self, name: str, now: float, update: float) -> None:
        if self._told.get(name) != now:
            self._told[name] = now
            self._metrics[name].add_or_update(update, self._labels)

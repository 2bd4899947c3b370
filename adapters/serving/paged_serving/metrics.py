"""PrometheusMetrics: what engines do, under the names that vLLM's and TGI's users have dashboards for.

An observer like any other: whoever has a place to be scraped at hands one to the Engine it builds. All but ``render``
is called by the thread that steps. prometheus_client is imported when the first is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from paged_core import FinishReason, PluginError, Request, RequestOutput, RequestStatus, StepStats, TierStats, hookimpl

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FEW = (1, 2, 5, 10, 20, 50, 100)

_GAUGES = {
    "vllm:num_requests_running": "Requests that are being computed",
    "vllm:num_requests_waiting": "Requests that wait for their turn",
    "vllm:kv_cache_usage_perc": "Share of the K/V blocks in use, 0 to 1",
    "paged:kv_cache_waste_perc": "Share of the slots in used blocks that hold no token, 0 to 1",
    "paged:kv_blocks_shared": "Blocks saved by sharing: references to blocks beyond the first",
    "paged:kv_blocks_cached": "Blocks kept for prefix hits only",
    "paged:num_requests_loading": "Requests whose blocks a tier is bringing; they wait, too",
}
_COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens of requests that have begun to answer",
    "vllm:generation_tokens": "Tokens generated",
    "vllm:prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "vllm:prefix_cache_hits": "Prompt tokens found there",
    "vllm:num_preemptions": "Requests that had to give back their blocks",
    "vllm:external_prefix_cache_queries": "Tokens looked for in tiers, since the prefix cache had not got them",
    "vllm:external_prefix_cache_hits": "Tokens that tiers have brought, and nobody had to compute",
    "vllm:kv_offload_store_bytes": "Bytes of K/V written to tiers, all of them together",
    "vllm:kv_offload_load_bytes": "Bytes of K/V read from tiers, all of them together",
    "paged:kv_loads": "Loads of blocks from tiers",
    "paged:kv_loads_abandoned": "Loads that were too slow, or whose blocks were gone or needed for others",
    "paged:late_compiles": "Graphs captured and kernels compiled while requests waited",
    "paged:steps_divided": "Steps computed in parts, since memory had no room for them",
}
_TIER_COUNTERS = {  # what each tier does -> where TierStats has it, and in words
    "paged:kv_tier_written_bytes": ("bytes_out", "Bytes of K/V written to a tier"),
    "paged:kv_tier_written_blocks": ("blocks_out", "Blocks written to a tier"),
    "paged:kv_tier_read_bytes": ("bytes_in", "Bytes of K/V read from a tier"),
    "paged:kv_tier_read_blocks": ("blocks_in", "Blocks read from a tier"),
    "paged:kv_tier_dropped_blocks": ("blocks_dropped", "Blocks not written, since the tier was behind or could not"),
    "paged:kv_tier_lost_blocks": ("blocks_lost", "Blocks that a tier should have held: damaged, or evicted meanwhile"),
}
_TIERS = ("host", "disk")  # told from the start
_TOTALS = {  # counters whose sums the engine keeps -> where StepStats has them
    "vllm:prefix_cache_queries": "total_prefix_queries",
    "vllm:prefix_cache_hits": "total_prefix_hits",
    "vllm:num_preemptions": "total_preemptions",
    "paged:late_compiles": "total_late_compiles",
    "paged:steps_divided": "total_steps_divided",
    "vllm:external_prefix_cache_queries": "offloading.total_tokens_asked",
    "vllm:external_prefix_cache_hits": "offloading.total_tokens_loaded",
    "vllm:kv_offload_store_bytes": "offloading.total_bytes_out",
    "vllm:kv_offload_load_bytes": "offloading.total_bytes_in",
    "paged:kv_loads": "offloading.total_loads",
    "paged:kv_loads_abandoned": "offloading.total_loads_abandoned",
}
_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token", _SECONDS),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a request", _SECONDS),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end", _SECONDS),
    "vllm:request_queue_time_seconds": ("From arrival to the first step", _SECONDS),
    "vllm:request_prefill_time_seconds": ("From the first step to the first token", _SECONDS),
    "vllm:request_decode_time_seconds": ("From the first token to the last", _SECONDS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request", _TOKENS),
    "vllm:request_params_n": ("Samples asked for", _FEW),
    "vllm:iteration_tokens_total": ("Tokens computed in a step", _TOKENS),
}
_TGI_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "tgi_request_duration": ("From arrival to the end, in seconds", _SECONDS),
    "tgi_request_queue_duration": ("From arrival to the first step, in seconds", _SECONDS),
    "tgi_request_inference_duration": ("From the first step to the end, in seconds", _SECONDS),
    "tgi_request_mean_time_per_token_duration": ("Inference time by tokens, in seconds", _SECONDS),
    "tgi_request_generated_tokens": ("Generated tokens of a request", _TOKENS),
    "tgi_request_input_length": ("Prompt tokens of a request", _TOKENS),
}
_TGI_GAUGES = {
    "tgi_queue_size": "Requests that wait for their turn",
    "tgi_batch_current_size": "Requests that are being computed",
    # Counters in truth. TGI's names have no _total, which the client library would add to a Counter's.
    "tgi_request_count": "Requests taken in",
    "tgi_request_success": "Requests that ended in a stop or at their length",
}


class _Times:
    """When what happened to one request: ``time.perf_counter()`` seconds."""

    __slots__ = ("arrival", "first_token", "last_token", "num_seen", "started")

    def __init__(self) -> None:
        self.arrival = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token = 0.0
        self.num_seen = 0  # of its tokens


class _Labelled:
    """A registry as its renderer sees it: each sample has some labels more."""

    def __init__(self, registry: Any, labels: Mapping[str, str]) -> None:
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterator[Any]:
        for family in self._registry.collect():
            family.samples = [each._replace(labels={**self._labels, **each.labels}) for each in family.samples]
            yield family


class PrometheusMetrics:
    """``metrics = PrometheusMetrics("my-model"); Engine(model, plugins=[metrics]); metrics.render()``

    ``registry``: where more metrics, or those of several engines, may go; its own when None.
    ``replica``: which of several processes it is: a label of all that is rendered.

    Raises:
        PluginError: prometheus_client isn't installed.
    """

    def __init__(self, model_name: str, registry: Any = None, *, replica: str | None = None) -> None:
        try:
            import prometheus_client as client
        except ImportError as error:
            raise PluginError("metrics need prometheus_client: pip install 'paged-core[server]'") from error
        self._client = client
        self._replica = replica
        self.registry = registry if registry is not None else client.CollectorRegistry()
        label = ("model_name",)
        known: dict[str, Any] = {"registry": self.registry}
        self._success = client.Counter(
            "vllm:request_success", "Requests by how they ended", (*label, "finished_reason"), **known
        )
        for reason in FinishReason:
            self._success.labels(model_name, reason.value)
        self._model_name = model_name
        self._metrics: dict[str, Any] = {
            **{name: client.Gauge(name, told, label, **known).labels(model_name) for name, told in _GAUGES.items()},
            **{name: client.Counter(name, told, label, **known).labels(model_name) for name, told in _COUNTERS.items()},
            **{
                name: client.Histogram(name, told, label, buckets=buckets, **known).labels(model_name)
                for name, (told, buckets) in _HISTOGRAMS.items()
            },
            **{name: client.Gauge(name, told, **known) for name, told in _TGI_GAUGES.items()},
            **{
                name: client.Histogram(name, told, buckets=buckets, **known)
                for name, (told, buckets) in _TGI_HISTOGRAMS.items()
            },
        }
        self._tier_metrics = {
            name: client.Counter(name, told, (*label, "tier"), **known) for name, (_, told) in _TIER_COUNTERS.items()
        }
        self._tier_totals: dict[tuple[str, str], int] = {}
        for tier in _TIERS:
            self._count_tier(TierStats(tier))
        self._open: dict[Request, _Times] = {}
        self._totals = dict.fromkeys(_TOTALS, 0)

    def render(self) -> tuple[bytes, str]:
        """(all metrics in Prometheus' text format, its content type). Callable from any thread."""
        registry = self.registry if self._replica is None else _Labelled(self.registry, {"replica": self._replica})
        return self._client.generate_latest(registry), self._client.CONTENT_TYPE_LATEST

    # ---- observers -----------------------------------------------------------------------------------------------

    @hookimpl
    def on_request_added(self, request: Request) -> None:
        self._open[request] = _Times()
        if request.index == 0:
            self._metrics["vllm:request_params_n"].observe(request.params.n)
            self._metrics["tgi_request_count"].inc()

    @hookimpl
    def on_step_finished(self, stats: StepStats) -> None:
        now = time.perf_counter()
        for request, times in self._open.items():
            self._advance(request, times, now - stats.duration_s, now)
        self._gauge(stats.num_running, stats.num_waiting, stats.kv_cache_usage, stats.kv_waste, stats.num_blocks_shared)
        metrics = self._metrics
        metrics["paged:kv_blocks_cached"].set(stats.num_blocks_cached)
        metrics["vllm:iteration_tokens_total"].observe(stats.num_tokens)
        metrics["paged:num_requests_loading"].set(stats.offloading.num_loading)
        for name, field in _TOTALS.items():
            total = attrgetter(field)(stats)
            metrics[name].inc(total - self._totals[name])
            self._totals[name] = total
        for tier in stats.offloading.tiers:
            self._count_tier(tier)

    @hookimpl
    def on_request_finished(self, output: RequestOutput) -> None:
        request, now = output.request, time.perf_counter()
        times = self._open.pop(request)
        assert output.finish_reason is not None
        self._success.labels(self._model_name, output.finish_reason.value).inc()
        self._observe(("vllm:request_prompt_tokens", "tgi_request_input_length"), request.num_prompt)
        self._observe(("vllm:request_generation_tokens", "tgi_request_generated_tokens"), request.num_output)
        self._observe(("vllm:e2e_request_latency_seconds", "tgi_request_duration"), now - times.arrival)
        if times.first_token is not None:
            self._observe(("vllm:request_decode_time_seconds",), times.last_token - times.first_token)
        if times.started is not None and request.num_output:
            inference = now - times.started
            self._observe(("tgi_request_inference_duration",), inference)
            self._observe(("tgi_request_mean_time_per_token_duration",), inference / request.num_output)
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and request.index == 0:
            self._metrics["tgi_request_success"].inc()
        if not self._open:  # after an abort no step follows
            self._gauge(0, 0, 0.0, 0.0, 0)
            self._metrics["paged:num_requests_loading"].set(0)

    # ---- from what was seen --------------------------------------------------------------------------------------

    def _advance(self, request: Request, times: _Times, began: float, now: float) -> None:
        """What the step from ``began`` to ``now`` meant for one request."""
        if times.started is None:
            if _waits(request):
                return
            times.started = max(began, times.arrival)
            waited = times.started - times.arrival
            self._observe(("vllm:request_queue_time_seconds", "tgi_request_queue_duration"), waited)
        new = request.num_output - times.num_seen
        if new <= 0:
            return
        times.num_seen += new
        self._metrics["vllm:generation_tokens"].inc(new)
        if times.first_token is None:
            times.first_token = now
            self._observe(("vllm:time_to_first_token_seconds",), now - times.arrival)
            self._observe(("vllm:request_prefill_time_seconds",), now - times.started)
            if request.index == 0:
                self._metrics["vllm:prompt_tokens"].inc(request.num_prompt)
        else:
            self._observe(("vllm:inter_token_latency_seconds",), (now - times.last_token) / new)
        times.last_token = now

    def _count_tier(self, tier: TierStats) -> None:
        for name, (field, _) in _TIER_COUNTERS.items():
            total, key = getattr(tier, field), (name, tier.name)
            self._tier_metrics[name].labels(self._model_name, tier.name).inc(total - self._tier_totals.get(key, 0))
            self._tier_totals[key] = total

    def _observe(self, names: Sequence[str], value: float) -> None:
        for name in names:
            self._metrics[name].observe(value)

    def _gauge(self, running: int, waiting: int, usage: float, waste: float, shared: int) -> None:
        metrics = self._metrics
        metrics["vllm:num_requests_running"].set(running)
        metrics["vllm:num_requests_waiting"].set(waiting)
        metrics["tgi_batch_current_size"].set(running)
        metrics["tgi_queue_size"].set(waiting)
        metrics["vllm:kv_cache_usage_perc"].set(usage)
        metrics["paged:kv_cache_waste_perc"].set(waste)
        metrics["paged:kv_blocks_shared"].set(shared)


def _waits(request: Request) -> bool:
    """Whether nothing of it was computed yet. A sample that will fork starts with the one that computes its prompt."""
    if request.status is RequestStatus.PENDING_FORK:
        return all(row.status is not RequestStatus.RUNNING for row in request.group.members)
    return request.status in (RequestStatus.WAITING, RequestStatus.LOADING)

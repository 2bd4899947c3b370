"""PrometheusMetrics: metrics of engines, under the names of vLLM's and TGI's dashboards. It is an observer: a server
with a metrics endpoint passes one to its Engine. The stepping thread calls all methods but ``render``.
prometheus_client is imported when the first is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from paged_core import (
    FinishReason,
    PluginError,
    Request,
    RequestOutput,
    RequestStatus,
    StepStats,
    TierStats,
    hookimpl,
)
from paged_serving.metric_names import (
    CACHE_CONFIG,
    COUNTERS,
    ENGINE,
    GAUGES,
    HISTOGRAMS,
    PROMPT_BY_SOURCE,
    REASONS,
    SOURCES,
    TGI_GAUGES,
    TGI_HISTOGRAMS,
    TIER_COUNTERS,
    TIERS,
    TOTALS,
    WAITING_BY_REASON,
)

if TYPE_CHECKING:
    from paged_core import Engine


class _Times:
    """The times of one request's events: ``time.perf_counter()`` seconds."""

    __slots__ = ("arrival", "first_token", "last_token", "num_seen", "started")

    def __init__(self) -> None:
        self.arrival = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token = 0.0
        self.num_seen = 0  # of its tokens


class _Labelled:
    """A registry whose samples get further labels when rendered."""

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
        label, values = ("model_name", "engine"), (model_name, ENGINE)
        known: dict[str, Any] = {"registry": self.registry}
        self._success = client.Counter(
            "vllm:request_success", "Requests by how they ended", (*label, "finished_reason"), **known
        )
        for reason in FinishReason:
            self._success.labels(*values, reason.value)
        self._values = values
        self._metrics: dict[str, Any] = {
            **{name: client.Gauge(name, told, label, **known).labels(*values) for name, told in GAUGES.items()},
            **{name: client.Counter(name, told, label, **known).labels(*values) for name, told in COUNTERS.items()},
            **{
                name: client.Histogram(name, told, label, buckets=buckets, **known).labels(*values)
                for name, (told, buckets) in HISTOGRAMS.items()
            },
            **{name: client.Gauge(name, told, **known) for name, told in TGI_GAUGES.items()},
            **{
                name: client.Histogram(name, told, buckets=buckets, **known)
                for name, (told, buckets) in TGI_HISTOGRAMS.items()
            },
        }
        by_reason = client.Gauge(*WAITING_BY_REASON, (*label, "reason"), **known)
        self._waiting = {reason: by_reason.labels(*values, reason) for reason in REASONS}
        by_source = client.Counter(*PROMPT_BY_SOURCE, (*label, "source"), **known)
        self._prompt_tokens = {source: by_source.labels(*values, source) for source in SOURCES}
        self._tier_metrics = {
            name: client.Counter(name, told, (*label, "tier"), **known) for name, (_, told) in TIER_COUNTERS.items()
        }
        self._tier_totals: dict[tuple[str, str], int] = {}
        for tier in TIERS:
            self._count_tier(TierStats(tier))
        self.num_generated = 0  # tokens, so far
        self._open: dict[Request, _Times] = {}
        self._totals = dict.fromkeys(TOTALS, 0)

    def render(self) -> tuple[bytes, str]:
        """(all metrics in Prometheus' text format, its content type). Callable from any thread."""
        registry = self.registry if self._replica is None else _Labelled(self.registry, {"replica": self._replica})
        return self._client.generate_latest(registry), self._client.CONTENT_TYPE_LATEST

    def describe(self, engine: Engine) -> None:
        """Export the configuration of ``engine``'s cache: ``vllm:cache_config_info``, whose value is 1. Once."""
        sizes, config, device = engine.sizes, engine.config, engine.spec.device.type
        windows = {layer.sliding_window for layer in engine.spec.layers}
        told = {
            "engine": ENGINE,
            "block_size": sizes.block_size,
            "num_gpu_blocks": sizes.num_blocks,  # on a CPU too, as vLLM has it
            "num_cpu_blocks": 0,
            "cache_dtype": config.kv_cache_dtype or "auto",
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization if device == "cuda" else None,
            "sliding_window": windows.pop() if len(windows) == 1 else None,
            "swap_space_bytes": config.kv_host_bytes or 0,
            "kv_cache_memory_bytes": engine.memory.num_bytes,
        }
        told_as = "How the K/V cache is set up"
        gauge = self._client.Gauge("vllm:cache_config_info", told_as, CACHE_CONFIG, registry=self.registry)
        gauge.labels(**{name: str(value) for name, value in told.items()}).set(1)

    # ---- observers -----------------------------------------------------------------------------------------------

    @hookimpl
    def on_request_added(self, request: Request) -> None:
        self._open[request] = _Times()
        if request.index == 0:
            self._metrics["vllm:request_params_n"].observe(request.params.n)
            if request.params.max_tokens is not None:
                self._metrics["vllm:request_params_max_tokens"].observe(request.params.max_tokens)
            self._metrics["tgi_request_count"].inc()

    @hookimpl
    def on_step_finished(self, stats: StepStats) -> None:
        now = time.perf_counter()
        for request, times in self._open.items():
            self._advance(request, times, now - stats.duration_s, now)
        self._gauge(stats.num_running, stats.kv_cache_usage, stats.kv_waste, stats.num_blocks_shared)
        self._gauge_waiting(stats.num_waiting, stats.offloading.num_loading)
        metrics = self._metrics
        metrics["paged:kv_blocks_cached"].set(stats.num_blocks_cached)
        metrics["vllm:iteration_tokens_total"].observe(stats.num_tokens)
        for name, field in TOTALS.items():
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
        self._success.labels(*self._values, output.finish_reason.value).inc()
        self._observe(("vllm:request_prompt_tokens", "tgi_request_input_length"), request.num_prompt)
        self._observe(("vllm:request_generation_tokens", "tgi_request_generated_tokens"), request.num_output)
        if not any(row in self._open for row in request.group.members):
            longest = max(row.num_output for row in request.group.members)
            self._observe(("vllm:request_max_num_generation_tokens",), longest)
        self._observe(("vllm:e2e_request_latency_seconds", "tgi_request_duration"), now - times.arrival)
        if times.first_token is not None:
            decode_s = times.last_token - times.first_token
            self._observe(("vllm:request_decode_time_seconds",), decode_s)
            if times.num_seen > 1:
                self._observe(("vllm:request_time_per_output_token_seconds",), decode_s / (times.num_seen - 1))
        if times.started is not None and request.num_output:
            inference = now - times.started
            self._observe(("vllm:request_inference_time_seconds", "tgi_request_inference_duration"), inference)
            self._observe(("tgi_request_mean_time_per_token_duration",), inference / request.num_output)
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and request.index == 0:
            self._metrics["tgi_request_success"].inc()
        if not self._open:  # after an abort no step follows
            self._gauge(0, 0.0, 0.0, 0)
            self._gauge_waiting(0, 0)

    # ---- from what was seen --------------------------------------------------------------------------------------

    def _advance(self, request: Request, times: _Times, began: float, now: float) -> None:
        """Count the step from ``began`` to ``now`` for one request."""
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
        self.num_generated += new
        if times.first_token is None:
            times.first_token = now
            self._observe(("vllm:time_to_first_token_seconds",), now - times.arrival)
            self._observe(("vllm:request_prefill_time_seconds",), now - times.started)
            if request.index == 0:
                self._count_prompt(request)
        else:
            each = (now - times.last_token) / new
            self._observe(("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"), each)
        times.last_token = now

    def _count_prompt(self, request: Request) -> None:
        num_cached = min(request.num_cached, request.num_prompt)
        num_loaded = min(request.num_loaded, num_cached)
        self._metrics["vllm:prompt_tokens"].inc(request.num_prompt)
        for source, number in zip(
            SOURCES, (request.num_prompt - num_cached, num_cached - num_loaded, num_loaded), strict=True
        ):
            self._prompt_tokens[source].inc(number)

    def _count_tier(self, tier: TierStats) -> None:
        for name, (field, _) in TIER_COUNTERS.items():
            total, key = getattr(tier, field), (name, tier.name)
            self._tier_metrics[name].labels(*self._values, tier.name).inc(total - self._tier_totals.get(key, 0))
            self._tier_totals[key] = total

    def _observe(self, names: Sequence[str], value: float) -> None:
        for name in names:
            self._metrics[name].observe(value)

    def _gauge_waiting(self, waiting: int, loading: int) -> None:
        """``loading``: of those that wait, for a tier."""
        self._metrics["vllm:num_requests_waiting"].set(waiting)
        self._metrics["tgi_queue_size"].set(waiting)
        self._metrics["paged:num_requests_loading"].set(loading)
        for reason, number in zip(REASONS, (waiting - loading, loading), strict=True):
            self._waiting[reason].set(number)

    def _gauge(self, running: int, usage: float, waste: float, shared: int) -> None:
        metrics = self._metrics
        metrics["vllm:num_requests_running"].set(running)
        metrics["tgi_batch_current_size"].set(running)
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
            metrics[name].set(usage)
        metrics["paged:kv_cache_waste_perc"].set(waste)
        metrics["paged:kv_blocks_shared"].set(shared)


def _waits(request: Request) -> bool:
    """Whether none of its tokens was computed yet. A sample that will fork starts with the one that computes its
    prompt."""
    if request.status is RequestStatus.PENDING_FORK:
        return all(row.status is not RequestStatus.RUNNING for row in request.group.members)
    return request.status in (RequestStatus.WAITING, RequestStatus.LOADING)

"""PrometheusMetrics, as a scraper sees them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from alphabet_model import AlphabetModel
from async_calls import params
from paged_core import BlockLayout, Engine, EngineConfig, PluginError, StepStats, hookimpl
from paged_core.tiers.host import HostTier
from paged_serving import PrometheusMetrics

VLLM = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"],
    "counter": ["prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
                "request_success"],
    "histogram": ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
                  "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
                  "request_prompt_tokens", "request_generation_tokens", "request_params_n", "iteration_tokens_total",
                  "time_per_output_token_seconds", "request_time_per_output_token_seconds",
                  "request_inference_time_seconds", "request_max_num_generation_tokens", "request_params_max_tokens"],
}  # fmt: skip
TGI = [
    "tgi_request_count", "tgi_request_success", "tgi_queue_size", "tgi_batch_current_size",
    "tgi_request_duration_count", "tgi_request_mean_time_per_token_duration_count", "tgi_request_generated_tokens_sum",
]  # fmt: skip


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics("alphabet")


@pytest.fixture
def model() -> AlphabetModel:
    return AlphabetModel()


@pytest.fixture
def engine(model: AlphabetModel, metrics: PrometheusMetrics) -> Iterator[Engine]:
    config = EngineConfig(num_blocks=40, block_size=4, max_num_seqs=4, attention_backend="reference")
    engine = Engine(model, config, plugins=[metrics])
    yield engine
    engine.close()


@pytest.fixture
def a_second_each(model: AlphabetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward takes one second, and nothing else takes time."""
    seconds = [0.0]
    model.before_forward = lambda token_ids: seconds.append(seconds[-1] + 1)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[-1])


def test_how_the_cache_is_set_up_is_told_as_labels(engine: Engine, metrics: PrometheusMetrics) -> None:
    metrics.describe(engine)
    families = text_string_to_metric_families(metrics.render()[0].decode())
    (sample,) = next(family.samples for family in families if family.name == "vllm:cache_config_info")
    told = {name: sample.labels[name] for name in ("block_size", "num_gpu_blocks", "cache_dtype", "engine")}
    assert (sample.value, told) == (
        1.0,
        {"block_size": "4", "num_gpu_blocks": str(engine.sizes.num_blocks), "cache_dtype": "auto", "engine": "0"},
    )


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def scrape(metrics: PrometheusMetrics) -> dict[str, float]:
    """Sample name, and finished_reason where it has one -> value; buckets left out."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            if "le" not in sample.labels:
                reason = sample.labels.get("finished_reason")
                found[sample.name + (f" {reason}" if reason else "")] = sample.value
    return found


def test_every_name_that_dashboards_know_is_there_from_the_beginning(metrics: PrometheusMetrics) -> None:
    families = {f.name: f for f in text_string_to_metric_families(metrics.render()[0].decode())}
    for kind, names in VLLM.items():
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind
            assert family.samples
            assert all(sample.labels["model_name"] == "alphabet" for sample in family.samples)
            assert all(sample.labels["engine"] == "0" for sample in family.samples), "vLLM's dashboards ask for it"
    assert set(TGI) <= scrape(metrics).keys()
    assert {"paged:kv_cache_waste_perc", "paged:kv_blocks_shared"} <= scrape(metrics).keys()


@pytest.mark.usefixtures("a_second_each")
def test_a_requests_tokens_and_times_are_counted(engine: Engine, metrics: PrometheusMetrics) -> None:
    engine.add_request("a", [33, 34, 35], params(n=2, temperature=1))
    run(engine)
    found = scrape(metrics)
    assert found["vllm:prompt_tokens_total"] == 3
    assert found["vllm:generation_tokens_total"] == 10
    assert found["vllm:request_success_total length"] == 2
    assert found["vllm:request_success_total abort"] == 0
    assert found["vllm:request_params_n_sum"] == 2
    assert found["vllm:time_to_first_token_seconds_count"] == 2
    assert found["vllm:inter_token_latency_seconds_count"] == 8
    assert found["vllm:request_generation_tokens_sum"] == 10
    assert found["tgi_request_count"] == found["tgi_request_success"] == 1
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time", "e2e_request_latency")
    assert [found[f"vllm:{part}_seconds_sum"] for part in parts] == [0, 2, 8, 10]


def test_gauges_follow_the_engine_and_fall_to_nothing(engine: Engine, metrics: PrometheusMetrics) -> None:
    for number in range(6):
        engine.add_request(str(number), [33] * 5, params())
    engine.step()
    engine.step()
    found = scrape(metrics)
    assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (4, 2)
    assert (found["tgi_batch_current_size"], found["tgi_queue_size"]) == (4, 2)
    assert 'reason="capacity"} 2.0' in metrics.render()[0].decode()
    assert 0 < found["vllm:kv_cache_usage_perc"] < 1
    assert 0 < found["paged:kv_cache_waste_perc"] < 1
    for number in range(6):
        engine.abort(str(number))
    run(engine)
    found = scrape(metrics)
    assert [found[f"vllm:num_requests_{what}"] for what in ("running", "waiting")] == [0, 0]
    assert found["vllm:kv_cache_usage_perc"] == 0
    assert found["vllm:request_success_total abort"] == 6
    assert found["tgi_request_success"] == 0


@pytest.mark.usefixtures("a_second_each")
def test_waiting_is_queue_time_and_not_prefill(engine: Engine, metrics: PrometheusMetrics) -> None:
    for number in range(8):  # the last four start when the first four have ended
        engine.add_request(str(number), [33 + number], params())
    run(engine)
    found = scrape(metrics)
    assert found["vllm:request_queue_time_seconds_count"] == 8
    assert found["vllm:request_queue_time_seconds_sum"] == 4 * 5, "the steps of the first four"
    assert found["vllm:request_prefill_time_seconds_sum"] == 8


def test_samples_that_have_not_forked_yet_wait_too(engine: Engine, metrics: PrometheusMetrics) -> None:
    engine.add_request("first", [33], params(n=4, temperature=1))  # all seats
    engine.add_request("second", [34], params(n=3, temperature=1))
    engine.step()
    assert scrape(metrics)["vllm:request_queue_time_seconds_count"] == 4
    run(engine)
    assert scrape(metrics)["vllm:request_queue_time_seconds_count"] == 7
    families = text_string_to_metric_families(metrics.render()[0].decode())
    queue = next(family for family in families if family.name == "vllm:request_queue_time_seconds")
    assert queue.samples[-1].value > 0


def test_prefix_hits_and_shared_blocks_are_counted(engine: Engine, metrics: PrometheusMetrics) -> None:
    prompt = list(range(33, 46))
    engine.add_request("a", prompt, params())
    run(engine)
    assert scrape(metrics)["vllm:prefix_cache_hits_total"] == 0
    engine.add_request("b", prompt, params(n=2))
    engine.step()
    found = scrape(metrics)
    assert found["vllm:prefix_cache_hits_total"] == 12
    assert found["vllm:prefix_cache_queries_total"] >= 26
    assert found["paged:kv_blocks_shared"] >= 3


class Beside:
    """A tier in memory."""

    @hookimpl
    def create_offload_tier(self, layout: BlockLayout) -> HostTier:
        return HostTier(40 * layout.block_bytes, layout.block_bytes, pinned=False)


def test_what_tiers_have_done_is_counted_under_vllms_names_and_by_tier(
    model: AlphabetModel, metrics: PrometheusMetrics
) -> None:
    config = EngineConfig(num_blocks=40, block_size=4, attention_backend="reference")
    engine = Engine(model, config, plugins=[metrics, Beside()])
    for _ in range(2):
        engine.add_request("a", list(range(33, 46)), params(max_tokens=1))
        run(engine)
        assert engine.save_prefix_cache() in (3, 0)
        engine.release_memory()
    engine.add_request("b", [33], params(max_tokens=1))  # numbers are told after a step
    run(engine)
    found = scrape(metrics)
    assert found["vllm:external_prefix_cache_queries_total"] == 13 + 13 + 1
    assert found["vllm:external_prefix_cache_hits_total"] == 12
    block_bytes = engine.memory.num_bytes // (engine.memory.num_blocks_backed + 1)  # one is the null block
    assert found["vllm:kv_offload_store_bytes_total"] == found["vllm:kv_offload_load_bytes_total"] == 3 * block_bytes
    by_tier = metrics.render()[0].decode()
    for source, number in (("local_compute", 13 + 1 + 1), ("local_cache_hit", 0), ("external_kv_transfer", 12)):
        assert f'model_name="alphabet",source="{source}"}} {number}.0' in by_tier
    for name in ("written_blocks", "read_blocks"):
        assert f'paged:kv_tier_{name}_total{{engine="0",model_name="alphabet",tier="host"}} 3.0' in by_tier
    engine.close()


def test_late_compiles_and_divided_steps_are_counted_from_what_the_engine_has_seen(metrics: PrometheusMetrics) -> None:
    stats = StepStats(*[0.1, 1, 0, 1, 1, 0, 4, 1, 0, 0, 0, 4, 0, 0, 0])
    for late, divided in ((0, 0), (2, 1), (2, 4)):
        metrics.on_step_finished(stats._replace(total_late_compiles=late, total_steps_divided=divided))
        found = scrape(metrics)
        assert (found["paged:late_compiles_total"], found["paged:steps_divided_total"]) == (late, divided)


def test_without_the_client_library_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(PluginError, match=r"paged-core\[server\]"):
        PrometheusMetrics("alphabet")


def test_one_of_several_processes_is_named_in_all_that_it_tells(model: AlphabetModel) -> None:
    metrics = PrometheusMetrics("alphabet", replica="r1")
    page = metrics.render()[0].decode()
    samples = [each for family in text_string_to_metric_families(page) for each in family.samples]
    assert len(samples) > 100
    assert {each.labels.get("replica") for each in samples} == {"r1"}

"""Names and descriptions of the metrics, as in dashboards for vLLM and TGI."""

from __future__ import annotations

from collections.abc import Sequence

# Every threshold that vLLM's dashboards offer for first and next tokens is one of these.
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 25, 50, 100,
            250, 500)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FEW = (1, 2, 5, 10, 20, 50, 100)

GAUGES = {
    "vllm:num_requests_running": "Requests that are being computed",
    "vllm:num_requests_waiting": "Requests that wait for their turn",
    "vllm:kv_cache_usage_perc": "Share of the K/V blocks in use, 0 to 1",
    "vllm:gpu_cache_usage_perc": "The same, under vLLM's older name",
    "paged:kv_cache_waste_perc": "Share of the slots in used blocks that hold no token, 0 to 1",
    "paged:kv_blocks_shared": "Blocks saved by sharing: references to blocks beyond the first",
    "paged:kv_blocks_cached": "Blocks kept for prefix hits only",
    "paged:num_requests_loading": "Requests whose blocks a tier is bringing; they wait, too",
}
COUNTERS = {
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
TIER_COUNTERS = {  # what each tier does -> where TierStats has it, and in words
    "paged:kv_tier_written_bytes": ("bytes_out", "Bytes of K/V written to a tier"),
    "paged:kv_tier_written_blocks": ("blocks_out", "Blocks written to a tier"),
    "paged:kv_tier_read_bytes": ("bytes_in", "Bytes of K/V read from a tier"),
    "paged:kv_tier_read_blocks": ("blocks_in", "Blocks read from a tier"),
    "paged:kv_tier_dropped_blocks": ("blocks_dropped", "Blocks not written, since the tier was behind or could not"),
    "paged:kv_tier_lost_blocks": ("blocks_lost", "Blocks that a tier should have held: damaged, or evicted meanwhile"),
}
TIERS = ("host", "disk")  # told from the start
TOTALS = {  # counters whose sums the engine keeps -> where StepStats has them
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
HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token", _SECONDS),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a request", _SECONDS),
    "vllm:time_per_output_token_seconds": ("The same, under vLLM's older name", _SECONDS),
    "vllm:request_time_per_output_token_seconds": ("Decode time by tokens after the first", _SECONDS),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end", _SECONDS),
    "vllm:request_queue_time_seconds": ("From arrival to the first step", _SECONDS),
    "vllm:request_prefill_time_seconds": ("From the first step to the first token", _SECONDS),
    "vllm:request_decode_time_seconds": ("From the first token to the last", _SECONDS),
    "vllm:request_inference_time_seconds": ("From the first step to the end", _SECONDS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request", _TOKENS),
    "vllm:request_max_num_generation_tokens": ("Generated tokens of the longest sample of a request", _TOKENS),
    "vllm:request_params_n": ("Samples asked for", _FEW),
    "vllm:request_params_max_tokens": ("Most tokens asked for, where somebody said", _TOKENS),
    "vllm:iteration_tokens_total": ("Tokens computed in a step", _TOKENS),
}
TGI_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "tgi_request_duration": ("From arrival to the end, in seconds", _SECONDS),
    "tgi_request_queue_duration": ("From arrival to the first step, in seconds", _SECONDS),
    "tgi_request_inference_duration": ("From the first step to the end, in seconds", _SECONDS),
    "tgi_request_mean_time_per_token_duration": ("Inference time by tokens, in seconds", _SECONDS),
    "tgi_request_generated_tokens": ("Generated tokens of a request", _TOKENS),
    "tgi_request_input_length": ("Prompt tokens of a request", _TOKENS),
}
TGI_GAUGES = {
    "tgi_queue_size": "Requests that wait for their turn",
    "tgi_batch_current_size": "Requests that are being computed",
    # Counters in truth. TGI's names have no _total, which the client library would add to a Counter's.
    "tgi_request_count": "Requests taken in",
    "tgi_request_success": "Requests that ended in a stop or at their length",
}
WAITING_BY_REASON = ("vllm:num_requests_waiting_by_reason", "Requests that wait for blocks or a seat, or for a tier")
REASONS = ("capacity", "deferred")
PROMPT_BY_SOURCE = (
    "vllm:prompt_tokens_by_source",
    "Prompt tokens computed, found in the prefix cache, brought by tiers",
)
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
HTTP_REQUESTS = ("http_requests", "Requests by route and class of status; probes and scrapes are left out")
HTTP_DURATION = ("http_request_duration_seconds", "From a request to the end of its answer")
ENGINE = "0"  # the label: vLLM's replicas in one process; there is one here
CACHE_CONFIG = (  # labels of vllm:cache_config_info
    "engine", "block_size", "num_gpu_blocks", "num_cpu_blocks", "cache_dtype", "enable_prefix_caching",
    "gpu_memory_utilization", "sliding_window", "swap_space_bytes", "kv_cache_memory_bytes",
)  # fmt: skip

"""EngineConfig: every choice of an engine, checked once and never written again."""

from __future__ import annotations

from dataclasses import dataclass

from paged_core.errors import ConfigError

KV_CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")  # the last two with scales


@dataclass(frozen=True)
class EngineConfig:
    """How an Engine uses memory and time.

    Sizes left at None are chosen from the model and the device when the engine is built.

    Raises:
        ConfigError: a value is out of its range.
    """

    block_size: int | None = None  # slots in a block; None: 8 on a CPU, where small ones cost nothing, 16 on a GPU
    num_blocks: int | None = None  # blocks in the cache; None: as many as kv_cache_bytes holds
    kv_cache_bytes: int | None = None  # None: a quarter of the device's free memory, at most 4 GiB
    gpu_memory_utilization: float | None = None  # instead, on a GPU: share of it for model, largest step and K/V
    kv_cache_slab_bytes: int | None = None  # memory that the cache takes at a time; None: all of it at once
    kv_cache_dtype: str | None = None  # one of KV_CACHE_DTYPES; None: the model's
    max_num_seqs: int | None = None  # requests running at once; None: half the tokens a step, at most 256
    max_num_batched_tokens: int | None = None  # tokens a step; None: 64 a thread (128 to 2048) on a CPU, 8192 on a GPU
    max_model_len: int | None = None  # tokens in a sequence; None: the model's limit
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"  # "fcfs", "priority", or a plugin's own
    attention_backend: str = "auto"  # "auto", "cpu", "triton", "reference", or a plugin's own
    watermark: float = 0.01  # share of the blocks kept free at admission
    cuda_graphs: bool | None = None  # replay decode steps as CUDA graphs; None: where device and backend can
    lookahead: bool | None = None  # begin a step before the host knows the last one's tokens; None: on a GPU
    fast_forwards: bool = True  # let plugins stand in for submodules (packed linears, fused norms)
    compile_model: bool = False  # by torch.compile, in place of fast_forwards; not yet measured
    seed: int | None = None  # of the requests that bring none; None: fresh each time
    max_prompt_logprob_rows: int = 256  # prompt positions whose logits are computed in one step

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "block_size",
            "num_blocks",
            "kv_cache_bytes",
            "kv_cache_slab_bytes",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "max_prompt_logprob_rows",
        )
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark is {self.watermark}; it must be at least 0 and below 1")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )
        if self.kv_cache_dtype not in (None, *KV_CACHE_DTYPES):
            raise ConfigError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; use {', '.join(KV_CACHE_DTYPES)} or None")
        budget = self.max_num_batched_tokens
        if budget is not None and self.max_num_seqs is not None and budget < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) is below max_num_seqs ({self.max_num_seqs}): "
                "a step could not give each running request a token; raise the first or lower the second"
            )


def _at_least(config: EngineConfig, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} is {value}; it must be at least {low}")

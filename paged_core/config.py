"""EngineConfig: the user's settings of an engine, checked once. EngineSizes: the sizes chosen from them. Both are
immutable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from paged_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

KV_CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")  # the last two with scales
WEIGHTS = ("int8", "int4")


class Option(NamedTuple):
    """How a field of EngineConfig is described on command lines and in the docs' tables."""

    what: str
    default: str  # in words: what happens if the option is left out
    flag: str | None = None  # the option on command lines; None: it has none, and only Python code and files can set it
    metavar: str | None = None


def _option(default: Any, what: str, told: str, flag: str | None = None, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"option": Option(what, told, flag, metavar)})


# Fields that must be at least 1 where they are set.
_COUNTS = (
    "block_size", "num_blocks", "kv_cache_bytes", "kv_cache_slab_bytes", "max_num_seqs", "max_num_batched_tokens",
    "max_model_len", "max_prompt_logprob_rows", "kv_disk_bytes", "kv_host_bytes", "tensor_parallel_size",
)  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """The user's settings of an Engine. Sizes that are None are chosen from the model and the device when the engine is
    built; ``Engine.sizes`` has the results.

    Raises:
        ConfigError: a value is out of its range.
    """

    block_size: int | None = _option(None, "tokens per block", "8 on a CPU, 16 on a GPU", "--block-size", "N")
    num_blocks: int | None = _option(None, "blocks in the cache", "as many as kv_cache_bytes holds")
    kv_cache_bytes: int | None = _option(
        None,
        "memory for keys and values, in bytes",
        "a quarter of the device's free memory, 4 GiB at most",
        "--kv-bytes",
        "N",
    )
    gpu_memory_utilization: float | None = _option(
        None,
        "on a GPU, instead of kv_cache_bytes: share of its memory for model, largest step and K/V",
        "kv_cache_bytes decides; paged serve: 0.9",
        "--gpu-memory-utilization",
        "SHARE",
    )
    kv_cache_slab_bytes: int | None = _option(None, "bytes by which the cache grows", "the whole cache at once")
    kv_cache_dtype: str | None = _option(
        None, "dtype of K/V: " + ", ".join(KV_CACHE_DTYPES), "the model's", "--kv-cache-dtype", "DTYPE"
    )
    weights: str | None = _option(
        None,
        "on a CPU, pack linear layers as int8 or int4, which changes tokens (docs/cpu.md)",
        "as the model has them",
        "--weights",
        "KIND",
    )
    max_num_seqs: int | None = _option(
        None, "most sequences that run at once", "half of max_num_batched_tokens, at most 256", "--max-num-seqs", "N"
    )
    max_num_batched_tokens: int | None = _option(
        None,
        "most tokens per step",
        "64 per thread on a CPU, 256 if AMX multiplies its weights (128 to 2048); 8192 on a GPU",
        "--max-num-batched-tokens",
        "N",
    )
    max_model_len: int | None = _option(
        None, "most tokens of a sequence, prompt and output", "the model's limit", "--max-model-len", "N"
    )
    tensor_parallel_size: int = _option(
        1, "ranks (processes) that the model is split over", "1", "--tensor-parallel-size", "N"
    )
    enable_prefix_caching: bool = _option(
        True, "reuse the K/V of prompts for later prompts with the same beginning", "yes", "--no-prefix-caching"
    )
    kv_disk_path: str | None = _option(
        None, "folder for K/V that survive eviction and restarts; processes may share it", "none", "--kv-disk", "DIR"
    )
    kv_disk_bytes: int | None = _option(None, "most bytes of that folder's files", "10 GiB", "--kv-disk-bytes", "N")
    kv_host_bytes: int | None = _option(
        None, "host memory for K/V that are evicted from a GPU, in bytes", "none", "--kv-host-bytes", "N"
    )
    scheduling_policy: str = _option(
        "fcfs", "order of requests: fcfs, priority, or a plugin's policy", "fcfs", "--scheduling-policy", "NAME"
    )
    attention_backend: str = _option(
        "auto", "cpu, triton, reference, or a plugin's backend", "the fastest that can run the model",
        "--attention-backend", "NAME",
    )  # fmt: skip
    watermark: float = _option(0.01, "share of blocks that stays free when a request starts", "0.01")
    cuda_graphs: bool | None = _option(
        None, "replay decode steps as CUDA graphs", "if device and backend can", "--no-cuda-graphs"
    )
    lookahead: bool | None = _option(None, "begin a step before the host knows the previous step's tokens", "on a GPU")
    fast_forwards: bool = _option(True, "replace submodules by faster forwards: packed linears, fused norms", "yes")
    compile_model: bool = _option(False, "use torch.compile instead of fast_forwards; not measured yet", "no")
    seed: int | None = _option(None, "base seed for requests without a seed", "random", "--seed", "N")
    max_prompt_logprob_rows: int = _option(256, "most prompt positions with logprobs per step", "256")

    def __post_init__(self) -> None:
        _at_least(self, 1, *_COUNTS)
        self._check_ranks()
        self._check_memory()
        self._check_weights()
        budget = self.max_num_batched_tokens
        if budget is not None and self.max_num_seqs is not None and budget < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) is below max_num_seqs ({self.max_num_seqs}): "
                "a step could not give each running request a token; raise the first or lower the second"
            )

    def _check_memory(self) -> None:
        if self.kv_disk_path is not None and not str(self.kv_disk_path):
            raise ConfigError("kv_disk_path is empty; name a folder, or leave it out")
        if self.kv_disk_bytes is not None and self.kv_disk_path is None:
            raise ConfigError(f"kv_disk_bytes is {self.kv_disk_bytes}, but no kv_disk_path says where; give both")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark is {self.watermark}; it must be at least 0 and below 1")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )
        if self.kv_cache_dtype not in (None, *KV_CACHE_DTYPES):
            raise ConfigError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; use {', '.join(KV_CACHE_DTYPES)} or None")

    def _check_weights(self) -> None:
        if self.weights not in (None, *WEIGHTS):
            raise ConfigError(f"weights is {self.weights!r}; use {', '.join(WEIGHTS)} or None")
        if self.weights is not None and (self.compile_model or not self.fast_forwards):
            raise ConfigError(
                f"weights is {self.weights!r}, which takes forwards that stand in for linear layers; leave "
                "compile_model and fast_forwards out"
            )

    def _check_ranks(self) -> None:
        """Refuse settings that work in one process only, if there are several ranks."""
        if self.tensor_parallel_size == 1:
            return
        for name in ("kv_disk_path", "kv_host_bytes", "compile_model", "cuda_graphs", "lookahead", "weights"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, which works in one process, and tensor_parallel_size is "
                    f"{self.tensor_parallel_size}; leave one of them out"
                )


@dataclass(frozen=True)
class StepSizes:
    """The sizes of a step and of a block, which are known before any memory is allocated."""

    block_size: int  # slots of a block
    max_num_seqs: int  # requests running at once
    max_num_batched_tokens: int  # tokens of a step
    max_model_len: int  # tokens of a sequence, prompt and output
    kv_dtype: torch.dtype  # of K/V in the cache


@dataclass(frozen=True)
class EngineSizes(StepSizes):
    """All sizes of an engine."""

    num_blocks: int  # in the cache when it has grown to its limit
    num_slab_blocks: int  # the cache begins with this many blocks, and grows by this many
    watermark_blocks: int  # kept free at admission


def _at_least(config: EngineConfig, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} is {value}; it must be at least {low}")

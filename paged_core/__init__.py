"""Paged KV memory and continuous batching: the names that adapters and plugins may import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paged_core.config import EngineConfig, EngineSizes, StepSizes
from paged_core.errors import (
    ConfigError,
    EngineBusyError,
    EngineDeadError,
    InvalidRequestError,
    PagedCoreError,
    PluginError,
    ReentryError,
    RequestError,
    UnsupportedModel,
)
from paged_core.hookspecs import Commands, hookimpl
from paged_core.scheduling.block_pool import BlockContent, BlockPool
from paged_core.scheduling.block_table import BlockTable
from paged_core.scheduling.cache_events import AllBlocksCleared, BlockRemoved, BlockStored, CacheEvent
from paged_core.scheduling.params import LogitsProcessor, SamplingParams
from paged_core.scheduling.policies import SchedulingPolicy
from paged_core.scheduling.request import FinishReason, Logprob, Request, RequestOutput, Selection
from paged_core.stats import StepStats

if TYPE_CHECKING:
    from paged_core.engine.engine import Engine
    from paged_core.engine.openmp import release_helper_threads
    from paged_core.engine.view import BlockCells, EngineView, MemoryUse
    from paged_core.execution.batch import AttentionMetadata
    from paged_core.execution.fingerprint import fingerprint
    from paged_core.execution.kv_cache import KVCache
    from paged_core.execution.model import (
        Attend,
        AttentionBackend,
        KeyedAttend,
        ModuleForward,
        PagedModel,
        RequestSampler,
        TokenSelector,
    )
    from paged_core.execution.spec import LayerSpec, ModelSpec
    from paged_core.execution.split_linear import SplitLinear
    from paged_core.execution.watched import WatchedTensors
    from paged_core.frontends.async_engine import AsyncEngine, Stream
    from paged_core.frontends.engine_thread import EngineThread
    from paged_core.frontends.llm import LLM
    from paged_core.frontends.thread_policy import ThreadPolicy
    from paged_core.processors import settle_threads
    from paged_core.ranks.ranks import Ranks
    from paged_core.sampling.sampler import Greedy, Likeliest
    from paged_core.scheduling.request import RequestStatus
    from paged_core.text.codec import Prompt, TextCodec, prepare_params
    from paged_core.text.detokenizer import Detokenizer
    from paged_core.text.outputs import CompletionOutput, GenerationOutput, StreamDelta, TokenLogprobs
    from paged_core.text.prompts import encode_prompt
    from paged_core.tiers.stats import OffloadingStats, TierStats
    from paged_core.tiers.tier import BlockLayout, Fetch, OffloadTier, Piece

__version__ = "0.2.0"

# Names that need torch are imported when first used, so that `import paged_core` is quick.
_LAZY = {
    "AsyncEngine": "frontends.async_engine",
    "Attend": "execution.model",
    "AttentionBackend": "execution.model",
    "AttentionMetadata": "execution.batch",
    "BlockCells": "engine.view",
    "BlockLayout": "tiers.tier",
    "CompletionOutput": "text.outputs",
    "Detokenizer": "text.detokenizer",
    "Engine": "engine.engine",
    "EngineThread": "frontends.engine_thread",
    "EngineView": "engine.view",
    "Fetch": "tiers.tier",
    "GenerationOutput": "text.outputs",
    "Greedy": "sampling.sampler",
    "KVCache": "execution.kv_cache",
    "KeyedAttend": "execution.model",
    "LLM": "frontends.llm",
    "LayerSpec": "execution.spec",
    "Likeliest": "sampling.sampler",
    "MemoryUse": "engine.view",
    "ModelSpec": "execution.spec",
    "ModuleForward": "execution.model",
    "OffloadTier": "tiers.tier",
    "OffloadingStats": "tiers.stats",
    "PagedModel": "execution.model",
    "Piece": "tiers.tier",
    "Prompt": "text.codec",
    "Ranks": "ranks.ranks",
    "RequestSampler": "execution.model",
    "RequestStatus": "scheduling.request",
    "SplitLinear": "execution.split_linear",
    "Stream": "frontends.async_engine",
    "StreamDelta": "text.outputs",
    "TextCodec": "text.codec",
    "ThreadPolicy": "frontends.thread_policy",
    "TierStats": "tiers.stats",
    "TokenLogprobs": "text.outputs",
    "TokenSelector": "execution.model",
    "WatchedTensors": "execution.watched",
    "encode_prompt": "text.prompts",
    "fingerprint": "execution.fingerprint",
    "prepare_params": "text.codec",
    "release_helper_threads": "engine.openmp",
    "settle_threads": "processors",
}

__all__ = [
    "LLM",
    "AllBlocksCleared",
    "AsyncEngine",
    "Attend",
    "AttentionBackend",
    "AttentionMetadata",
    "BlockCells",
    "BlockContent",
    "BlockLayout",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "BlockTable",
    "CacheEvent",
    "Commands",
    "CompletionOutput",
    "ConfigError",
    "Detokenizer",
    "Engine",
    "EngineBusyError",
    "EngineConfig",
    "EngineDeadError",
    "EngineSizes",
    "EngineThread",
    "EngineView",
    "Fetch",
    "FinishReason",
    "GenerationOutput",
    "Greedy",
    "InvalidRequestError",
    "KVCache",
    "KeyedAttend",
    "LayerSpec",
    "Likeliest",
    "LogitsProcessor",
    "Logprob",
    "MemoryUse",
    "ModelSpec",
    "ModuleForward",
    "OffloadTier",
    "OffloadingStats",
    "PagedCoreError",
    "PagedModel",
    "Piece",
    "PluginError",
    "Prompt",
    "Ranks",
    "ReentryError",
    "Request",
    "RequestError",
    "RequestOutput",
    "RequestSampler",
    "RequestStatus",
    "SamplingParams",
    "SchedulingPolicy",
    "Selection",
    "SplitLinear",
    "StepSizes",
    "StepStats",
    "Stream",
    "StreamDelta",
    "TextCodec",
    "ThreadPolicy",
    "TierStats",
    "TokenLogprobs",
    "TokenSelector",
    "UnsupportedModel",
    "WatchedTensors",
    "__version__",
    "encode_prompt",
    "fingerprint",
    "hookimpl",
    "prepare_params",
    "release_helper_threads",
    "settle_threads",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_core' has no attribute {name!r}")
    value = getattr(import_module(f"paged_core.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Paged KV memory and continuous batching: the names that adapters and plugins may import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paged_core.config import EngineConfig
from paged_core.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    PagedCoreError,
    PluginError,
    RequestError,
    UnsupportedModel,
)
from paged_core.hookspecs import hookimpl
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.policies import SchedulingPolicy
from paged_core.scheduling.request import (
    FinishReason,
    LogitsProcessor,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
    Selection,
)
from paged_core.stats import StepStats

if TYPE_CHECKING:
    from paged_core.async_engine import AsyncEngine, Stream
    from paged_core.engine import Engine
    from paged_core.execution.batch import AttentionMetadata
    from paged_core.execution.kv_cache import KVCache
    from paged_core.execution.model import (
        Attend,
        AttentionBackend,
        LayerSpec,
        ModelSpec,
        ModuleForward,
        PagedModel,
        TokenSelector,
    )
    from paged_core.execution.sampler import Likeliest
    from paged_core.llm import LLM
    from paged_core.metrics import PrometheusMetrics
    from paged_core.openmp import release_helper_threads
    from paged_core.outputs import CompletionOutput, GenerationOutput, StreamDelta
    from paged_core.protocol.call import Call
    from paged_core.protocol.chat import ChatCall
    from paged_core.protocol.completions import CompletionCall
    from paged_core.protocol.failures import CallError, Failure, openai_error, tgi_error
    from paged_core.protocol.fields import ProtocolError, parse_json
    from paged_core.protocol.served import RequestLimits, ServedModel
    from paged_core.protocol.sketch import body_schema
    from paged_core.protocol.tgi import TGICall
    from paged_core.protocol.tokenize import tokenize
    from paged_core.view import BlockCells, EngineView

__version__ = "0.1.0"

# Names that need torch are imported when first used, so that `import paged_core` is quick.
_LAZY = {
    "AsyncEngine": "async_engine",
    "Attend": "execution.model",
    "AttentionBackend": "execution.model",
    "AttentionMetadata": "execution.batch",
    "BlockCells": "view",
    "Call": "protocol.call",
    "CallError": "protocol.failures",
    "ChatCall": "protocol.chat",
    "CompletionCall": "protocol.completions",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "EngineView": "view",
    "Failure": "protocol.failures",
    "GenerationOutput": "outputs",
    "KVCache": "execution.kv_cache",
    "LLM": "llm",
    "LayerSpec": "execution.model",
    "Likeliest": "execution.sampler",
    "ModelSpec": "execution.model",
    "ModuleForward": "execution.model",
    "PagedModel": "execution.model",
    "PrometheusMetrics": "metrics",
    "ProtocolError": "protocol.fields",
    "RequestLimits": "protocol.served",
    "ServedModel": "protocol.served",
    "Stream": "async_engine",
    "StreamDelta": "outputs",
    "TGICall": "protocol.tgi",
    "TokenSelector": "execution.model",
    "body_schema": "protocol.sketch",
    "openai_error": "protocol.failures",
    "parse_json": "protocol.fields",
    "release_helper_threads": "openmp",
    "tgi_error": "protocol.failures",
    "tokenize": "protocol.tokenize",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "Attend",
    "AttentionBackend",
    "AttentionMetadata",
    "BlockCells",
    "BlockPool",
    "Call",
    "CallError",
    "ChatCall",
    "CompletionCall",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EngineView",
    "Failure",
    "FinishReason",
    "GenerationOutput",
    "InvalidRequestError",
    "KVCache",
    "LayerSpec",
    "Likeliest",
    "LogitsProcessor",
    "Logprob",
    "ModelSpec",
    "ModuleForward",
    "PagedCoreError",
    "PagedModel",
    "PluginError",
    "PrometheusMetrics",
    "ProtocolError",
    "Request",
    "RequestError",
    "RequestLimits",
    "RequestOutput",
    "SamplingParams",
    "SchedulingPolicy",
    "Selection",
    "ServedModel",
    "StepStats",
    "Stream",
    "StreamDelta",
    "TGICall",
    "TokenSelector",
    "UnsupportedModel",
    "__version__",
    "body_schema",
    "hookimpl",
    "openai_error",
    "parse_json",
    "release_helper_threads",
    "tgi_error",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_core' has no attribute {name!r}")
    value = getattr(import_module(f"paged_core.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

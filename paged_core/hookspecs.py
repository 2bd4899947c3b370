"""Every extension point, and nothing else.

A plugin is a module or object whose functions carry ``@hookimpl`` and one of these names. Implementations may take
fewer parameters than are listed. Where "first answer wins", return None to pass. All hooks but the observers are called
while an Engine is built or a request is admitted: never per layer, never per token. In the ``config`` that hooks get,
all sizes are set except ``num_blocks``; ``sizes`` holds the same with dtypes resolved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    import torch

    from paged_core.config import EngineConfig, EngineSizes, StepSizes
    from paged_core.execution.kv_cache import KVCache
    from paged_core.execution.model import AttentionBackend, ModuleForward, PagedModel, RequestSampler
    from paged_core.execution.spec import ModelSpec
    from paged_core.ranks.ranks import Ranks
    from paged_core.scheduling.cache_events import CacheEvent
    from paged_core.scheduling.params import LogitsProcessor
    from paged_core.scheduling.policies import SchedulingPolicy
    from paged_core.scheduling.request import Request, RequestOutput
    from paged_core.stats import StepStats
    from paged_core.tiers.tier import BlockLayout, OffloadTier


class Commands(Protocol):
    """The subcommands of ``paged``, to which plugins can add."""

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        """Return the parser of a new subcommand. ``options`` are those of argparse.ArgumentParser. Call
        ``set_defaults(run=...)`` on the parser to say what the subcommand does: ``run(args) -> exit status``."""
        ...


hookspec = pluggy.HookspecMarker("paged_core")
hookimpl = pluggy.HookimplMarker("paged_core")


# ---- first answer wins -----------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def load_model(source: Any, device: str | None, dtype: str | None, ranks: Ranks | None) -> PagedModel | None:
    """Return a PagedModel from ``source``: a path, a hub id, or a live object such as a transformers model.

    ``ranks``: this process is one of several ranks, each of which calls the hook. Join them, and return this rank's
    shard, with ``num_ranks`` set."""


@hookspec(firstresult=True)
def load_tokenizer(source: Any) -> Any | None:
    """Return the tokenizer that belongs to ``source``: ``encode(text) -> ids``, ``decode(ids) -> text``
    (text.Tokenizer)."""


@hookspec(firstresult=True)
def create_kv_cache(spec: ModelSpec, num_blocks: int, config: EngineConfig, sizes: EngineSizes) -> KVCache | None:
    """Allocate the K/V tensors."""


@hookspec(firstresult=True)
def create_attention_backend(
    name: str, spec: ModelSpec, config: EngineConfig, sizes: StepSizes
) -> AttentionBackend | None:
    """Return the backend called ``name``, or any that can run every layer of ``spec`` if name is "auto". Return None if
    you can't honour a fact of some layer; never ignore one."""


@hookspec(firstresult=True)
def create_scheduling_policy(name: str, config: EngineConfig) -> SchedulingPolicy | None:
    """Return the policy called ``name``."""


@hookspec(firstresult=True)
def create_sampler(spec: ModelSpec, config: EngineConfig) -> RequestSampler | None:
    """Return the TokenSelector for requests without one of their own."""


@hookspec(firstresult=True)
def create_module_forward(
    module: torch.nn.Module, device: torch.device, config: EngineConfig
) -> ModuleForward | Callable[..., Any] | None:
    """Return a faster forward that computes the same as ``module.forward``. Only the engine's own steps use it. Compare
    it with the module before you return it. If it packs weights, give it ``stale() -> bool``. It may quantise as
    ``config.weights`` asks; then it needs the attribute ``quantized``."""


# ---- all answers used ------------------------------------------------------------------------------------------


@hookspec
def create_offload_tier(
    spec: ModelSpec, config: EngineConfig, sizes: EngineSizes, layout: BlockLayout
) -> OffloadTier | None:
    """Return a tier, which stores blocks that the cache evicts, and loads them when they are needed again. Evicted
    blocks go to all tiers; if several hold a block, the first one loads it."""


@hookspec
def create_logits_processor(request: Request) -> LogitsProcessor | None:
    """Return a logits processor for this request, called after the request's own. The hook is called once, at
    admission."""


@hookspec
def register_commands(commands: Commands) -> None:
    """Add subcommands to ``paged``."""


# ---- observers -------------------------------------------------------------------------------------------------


@hookspec
def on_request_added(request: Request) -> None:
    """A request has entered the queue."""


@hookspec
def on_step_finished(stats: StepStats) -> None:
    """A step has ended."""


@hookspec
def on_request_finished(output: RequestOutput) -> None:
    """A request has ended; ``output`` is its last one."""


@hookspec
def on_prefix_cache_changed(events: Sequence[CacheEvent]) -> None:
    """Blocks have entered or left the prefix cache. ``events`` are in the order in which that happened."""

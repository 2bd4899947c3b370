"""Every extension point, and nothing else.

A plugin is a module or object whose functions carry ``@hookimpl`` and one of these names. Implementations may take
fewer parameters than are listed. Where "first answer wins", return None to pass. All hooks but the observers are asked
while an Engine is built (or a request is admitted): never per layer, never per token. The ``config`` that they are
given has no size left open but ``num_blocks``; ``sizes`` says the same with dtypes resolved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    import torch

    from paged_core.config import EngineConfig, EngineSizes, StepSizes
    from paged_core.engine.stats import StepStats
    from paged_core.execution.kv_cache import KVCache
    from paged_core.execution.model import AttentionBackend, ModuleForward, PagedModel, RequestSampler
    from paged_core.execution.spec import ModelSpec
    from paged_core.ranks.ranks import Ranks
    from paged_core.scheduling.cache_events import CacheEvent
    from paged_core.scheduling.params import LogitsProcessor
    from paged_core.scheduling.policies import SchedulingPolicy
    from paged_core.scheduling.request import Request, RequestOutput
    from paged_core.tiers.tier import BlockLayout, OffloadTier


class Commands(Protocol):
    """The subcommands of ``paged``, for plugins to add to."""

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        """A new subcommand; ``options``: as argparse.ArgumentParser takes them. ``set_defaults(run=...)`` of what
        comes back says what it does: ``run(args) -> exit status``."""
        ...


hookspec = pluggy.HookspecMarker("paged_core")
hookimpl = pluggy.HookimplMarker("paged_core")


# ---- first answer wins -----------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def load_model(source: Any, device: str | None, dtype: str | None, ranks: Ranks | None) -> PagedModel | None:
    """A PagedModel from ``source``: a path, a hub id, or a live object such as a transformers model.

    ``ranks``: this process is one of several that are all asked. Join them, and answer this one's shard: its
    ``num_ranks`` says so."""


@hookspec(firstresult=True)
def load_tokenizer(source: Any) -> Any | None:
    """The tokenizer that belongs to ``source``: ``encode(text) -> ids``, ``decode(ids) -> text`` (text.Tokenizer)."""


@hookspec(firstresult=True)
def create_kv_cache(spec: ModelSpec, num_blocks: int, config: EngineConfig, sizes: EngineSizes) -> KVCache | None:
    """Allocate the K/V tensors."""


@hookspec(firstresult=True)
def create_attention_backend(
    name: str, spec: ModelSpec, config: EngineConfig, sizes: StepSizes
) -> AttentionBackend | None:
    """The backend called ``name``, or any that can run every layer of ``spec`` if name is "auto". Return None for a
    layer you can't honour; never ignore a fact of it."""


@hookspec(firstresult=True)
def create_scheduling_policy(name: str, config: EngineConfig) -> SchedulingPolicy | None:
    """The policy called ``name``."""


@hookspec(firstresult=True)
def create_sampler(spec: ModelSpec, config: EngineConfig) -> RequestSampler | None:
    """The TokenSelector for requests that bring none of their own."""


@hookspec(firstresult=True)
def create_module_forward(
    module: torch.nn.Module, device: torch.device, config: EngineConfig
) -> ModuleForward | Callable[..., Any] | None:
    """A faster forward of the same meaning as ``module.forward``, used inside the engine's own steps only. Check it
    against the module before you return it. If it packs weights, give it ``stale() -> bool``. What
    ``config.weights`` asks for it may do; it then says so (``quantized``)."""


# ---- all answers used ------------------------------------------------------------------------------------------


@hookspec
def create_offload_tier(
    spec: ModelSpec, config: EngineConfig, sizes: EngineSizes, layout: BlockLayout
) -> OffloadTier | None:
    """Where blocks go that the cache gives up, to be loaded when they are wanted again. Where several tiers hold a
    block, the one that was asked first brings it; what is given up goes to all of them."""


@hookspec
def create_logits_processor(request: Request) -> LogitsProcessor | None:
    """A logits processor for this request, called after its own. Asked once, at admission."""


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
    """A request has had its final output."""


@hookspec
def on_prefix_cache_changed(events: Sequence[CacheEvent]) -> None:
    """Blocks can be found by their content that could not be before, or the other way round; in order."""

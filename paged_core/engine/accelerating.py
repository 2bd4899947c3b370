"""Makes a loaded model faster: by torch.compile, or by plugins' forwards in place of its modules' forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from paged_core.config import EngineConfig, StepSizes
from paged_core.engine.loading import named
from paged_core.errors import ConfigError
from paged_core.execution import compiling
from paged_core.execution.model import AttentionBackend, ModuleForward, PagedModel
from paged_core.plugins import BUILTIN, Plugins

_log = logging.getLogger("paged_core")


def compile_model(
    model: PagedModel,
    backend: AttentionBackend,
    config: EngineConfig,
    sizes: StepSizes,
    progress: Callable[[str, int, int], None],
) -> None:
    """Compile the model with torch.compile and warm it up, if the config asks for it. What another engine had compiled
    is dropped."""
    if model.compilable and (config.compile_model or model.compiled):
        model.compile_forward(False)
    if not config.compile_model:
        return
    if not model.compilable:
        raise ConfigError(f"compile_model is True, but {named(model)} can't be compiled; leave it out")
    moved = compiling.compile_and_compare(model, backend, sizes.block_size, sizes.kv_dtype, progress)
    if not moved <= compiling.tolerance(model.spec.dtype):
        model.compile_forward(False)
        raise ConfigError(
            f"compiled, the model gives other logits (off by {moved:.2g} of their deviation); leave compile_model out"
        )


def accelerate(manager: Plugins, model: PagedModel, config: EngineConfig, owned: bool) -> None:
    """Let plugins replace forwards of submodules, if the model allows it and the config asks for it.

    Args:
        owned: whether only this engine uses the model. Weights with a packed copy are then freed.

    Raises:
        ConfigError: the config asks for quantised weights, and no plugin can quantise.
    """
    if not config.fast_forwards or config.compile_model:
        return
    ask, device = manager.hook.create_module_forward, model.spec.device
    num_quantized = num_left = 0

    def create(module: torch.nn.Module) -> Any:
        nonlocal num_quantized, num_left
        forward = ask(module=module, device=device, config=config)
        num_quantized += forward is not None and ModuleForward.of(forward).quantized
        num_left += forward is None and _is_linear(module)
        return forward

    if owned:
        if config.kv_disk_path is not None or _other_plugins_have_tiers(manager):
            model.fingerprint()  # computed now, because the weights may be freed
        model.hand_over()
    model.accelerate(create)
    if config.weights is not None and not num_quantized:
        raise ConfigError(
            f"weights is {config.weights!r}, but no layer of this model can be so here (it computes in "
            f"{str(model.spec.dtype).removeprefix('torch.')} on {device}); linear layers of float32 and bfloat16 on a "
            "CPU can, with paged-core[cpu]; leave weights out, or load the model so"
        )
    if config.weights is not None and num_left:
        layers = "1 linear layer runs as it is" if num_left == 1 else f"{num_left} linear layers run as they are"
        _log.warning("weights=%r: %s, from weights of a kind that is not packed", config.weights, layers)


def _is_linear(module: torch.nn.Module) -> bool:
    """Return whether it is torch's linear layer, or one of a library for quantisation."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return not module._modules and all(isinstance(size, int) for size in sizes)


def _other_plugins_have_tiers(manager: Plugins) -> bool:
    return any(found.plugin_name not in BUILTIN for found in manager.hook.create_offload_tier.get_hookimpls())

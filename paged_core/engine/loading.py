"""Loads the model of an engine: the caller's own PagedModel, or what a plugin makes of a path, a name or an object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from paged_core.engine.team import EngineArgs
from paged_core.errors import ConfigError, PluginError
from paged_core.execution.model import PagedModel
from paged_core.execution.spec import ModelSpec
from paged_core.plugins import Plugins, check_whole, describe
from paged_core.ranks.ranks import ALONE, Ranks

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # other names in torch and vLLM


def load_model(manager: Plugins, asked: EngineArgs, ranks: Ranks) -> PagedModel:
    """Return ``asked.model`` itself if it is a PagedModel, else what a plugin makes of it.

    Raises:
        ConfigError: a PagedModel is on another device, or computes in another dtype; or the path does not exist; or the
            plugin that loads the model can't split it over ranks.
        PluginError: no plugin can load it.
    """
    model, _, device, dtype = asked
    if PagedModel.is_met_by(model):
        _check_placed(model.spec, device, dtype)
        return PagedModel.of(model)
    split = None if ranks is ALONE else ranks
    loaded = manager.hook.load_model(source=model, device=device, dtype=dtype, ranks=split)
    if loaded is None:
        _refuse_missing(model)
        raise PluginError(
            f"no plugin can load {named(model)}; loaded plugins: {describe(manager)}. "
            "For Hugging Face models: pip install 'paged-core[hf]'"
        )
    check_whole(loaded, PagedModel.missing_in(loaded), "load_model")
    loaded = PagedModel.of(loaded)
    if loaded.num_ranks != ranks.size:
        raise ConfigError(
            f"tensor_parallel_size is {ranks.size}, and the plugin that loads {named(model)} can't split it; leave "
            "tensor_parallel_size out"
        )
    return loaded


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Return torch's name of the dtype, or None to keep the model's dtype."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def named(model: Any) -> str:
    """Return a name of the model for messages."""
    return repr(model) if isinstance(model, str) else f"an object of type {model.__class__.__name__}"


def _check_placed(spec: ModelSpec, device: str | None, dtype: str | None) -> None:
    """Raises ConfigError if a PagedModel has not the wanted device or dtype, because the engine neither moves nor casts
    it."""
    own = str(spec.dtype).removeprefix("torch.")
    if dtype not in (None, own) or device not in (None, "auto", spec.device.type, str(spec.device)):
        raise ConfigError(
            f"the model given computes in {own} on {spec.device}, and {dtype or own} on {device or spec.device} is "
            "asked for; leave dtype and device out, or give a model that is so"
        )


def _refuse_missing(model: Any) -> None:
    """Raises ConfigError if ``model`` can only be a path, and the path does not exist."""
    path = Path(model) if isinstance(model, str | os.PathLike) else Path()
    if (path.is_absolute() or str(model).startswith((".", "~"))) and not path.expanduser().exists():
        raise ConfigError(f"there is no folder or file {model}")

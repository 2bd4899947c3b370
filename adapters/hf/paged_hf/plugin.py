"""The plugin that paged_core finds by its entry point. Heavy imports wait until a hook is asked."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from paged_core import hookimpl


@hookimpl
def load_model(source: Any, device: str | None, dtype: str | None) -> Any:
    """A transformers model: live, from a folder, a hub id or a GGUF file, or "smollm2"."""
    if find_spec("transformers") is None:
        return None
    from paged_hf import loading

    return loading.load_model(source, device, dtype)


@hookimpl
def load_tokenizer(source: Any) -> Any:
    """The transformers tokenizer that belongs to ``source``."""
    if find_spec("transformers") is None:
        return None
    from paged_hf import loading

    return loading.load_tokenizer(source)


@hookimpl
def register_commands(commands: Any) -> None:
    """``paged generate`` and ``paged bench``."""
    from paged_hf import commands as ours

    ours.register(commands)

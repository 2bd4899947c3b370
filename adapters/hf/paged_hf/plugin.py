"""The plugin that paged_core finds by its entry point. Heavy imports wait until a hook is asked."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from paged_core import Commands, hookimpl

if TYPE_CHECKING:
    from paged_core import Ranks


@hookimpl(trylast=True)  # it takes nearly any string, so more specific plugins go first
def load_model(source: Any, device: str | None, dtype: str | None, ranks: Ranks | None) -> Any:
    """A transformers model: live, from a folder, a hub id or a GGUF file, or "smollm2"; or one rank's shard of it."""
    if not _may_be_ours(source):
        return None
    from paged_hf.loading import load

    return load.load_model(source, device, dtype, ranks=ranks)


@hookimpl(trylast=True)
def load_tokenizer(source: Any) -> Any:
    """The transformers tokenizer that belongs to ``source``."""
    if not _may_be_ours(source):
        return None
    from paged_hf.loading import load

    return load.load_tokenizer(source)


@hookimpl
def register_commands(commands: Commands) -> None:
    """``paged generate``."""
    from paged_hf import commands as ours

    ours.register(commands)


def _may_be_ours(source: Any) -> bool:
    """Decided without an import, because loading transformers takes seconds."""
    kind = isinstance(source, str | os.PathLike) or hasattr(source, "named_modules") or hasattr(source, "model")
    return kind and find_spec("transformers") is not None

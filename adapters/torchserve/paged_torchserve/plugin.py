"""The plugin that paged_core finds by its entry point. Heavy imports wait until a command runs."""

from __future__ import annotations

from typing import Any

from paged_core import hookimpl


@hookimpl
def register_commands(commands: Any) -> None:
    """``paged torchserve``."""
    from paged_torchserve import commands as ours

    ours.register(commands)

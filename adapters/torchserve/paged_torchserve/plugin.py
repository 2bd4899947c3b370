"""The plugin that paged_core finds by its entry point. Heavy imports wait until a command runs."""

from __future__ import annotations

from paged_core import Commands, hookimpl


@hookimpl
def register_commands(commands: Commands) -> None:
    """``paged torchserve``."""
    from paged_torchserve import commands as ours

    ours.register(commands)

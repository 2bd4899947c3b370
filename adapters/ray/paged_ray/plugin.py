"""The plugin that paged_core finds by its entry point. Heavy imports wait until the command runs."""

from __future__ import annotations

from paged_core import Commands, hookimpl


@hookimpl
def register_commands(commands: Commands) -> None:
    """``paged ray serve``."""
    from paged_ray import commands as ours

    ours.register(commands)

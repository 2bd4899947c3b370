"""The plugin that paged_core finds by its entry point. Heavy imports wait until the command runs."""

from __future__ import annotations

from typing import Any

from paged_core import hookimpl


@hookimpl
def register_commands(commands: Any) -> None:
    """``paged bench``."""
    from paged_bench import commands as ours

    ours.register(commands)

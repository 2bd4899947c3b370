"""The core's own sampler, as a plugin like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from paged_core.execution.model import TokenSelector


@hookimpl
def create_sampler() -> TokenSelector:
    """The vectorised sampler."""
    from paged_core.execution.sampler import Sampler

    return Sampler()

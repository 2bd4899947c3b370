"""Ray Serve: replicas of an engine on many machines, requests sent where their prompts' K/V are."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_ray.app import build, build_app
    from paged_ray.placement import CacheChanges, Placement
    from paged_ray.router import PrefixRouter
    from paged_ray.settings import Settings

# Imported when first used, because the command line and the simulator work without Ray.
_LAZY = {
    "Placement": "placement",
    "PrefixRouter": "router",
    "CacheChanges": "placement",
    "Settings": "settings",
    "build": "app",
    "build_app": "app",
}

__all__ = ["CacheChanges", "Placement", "PrefixRouter", "Settings", "build", "build_app"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_ray' has no attribute {name!r}")
    return getattr(import_module(f"paged_ray.{_LAZY[name]}"), name)

"""Loads plugins: built-in ones, installed ones (entry-point group ``paged_core``), and those that the caller passes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from paged_core import hookspecs
from paged_core.errors import PluginError

BUILTIN = (
    "paged_core.builtin.attention",
    "paged_core.builtin.forwards",
    "paged_core.builtin.gpu_forwards",
    "paged_core.builtin.sampler",
    "paged_core.builtin.scheduling",
    "paged_core.builtin.tiers",
    "paged_core.builtin.triton_attention",
)


class Plugins(pluggy.PluginManager):
    """A plugin manager that knows which distribution each installed plugin came from."""

    def __init__(self) -> None:
        super().__init__("paged_core")
        self.distributions: dict[str, str] = {}  # plugin name -> "distribution version"
        self.given: list[Any] = []  # plugins passed by the caller; other processes don't have them
        self.add_hookspecs(hookspecs)


def load_plugins(extra: Iterable[Any] = (), builtin: Iterable[str] = BUILTIN) -> Plugins:
    """Return a new plugin manager. Plugins registered later are called first; the order is built-ins, installed
    plugins, ``extra``.

    Raises:
        PluginError: a plugin can't be imported, or implements a hook that doesn't exist.
    """
    manager = Plugins()
    for name in builtin:
        manager.register(importlib.import_module(name), name)
    for entry_point in sorted(entry_points(group="paged_core"), key=lambda found: found.name):
        _register(manager, _load(entry_point), entry_point.name)
        if entry_point.dist is not None:
            manager.distributions[entry_point.name] = f"{entry_point.dist.name} {entry_point.dist.version}"
    for plugin in extra:
        manager.given.append(plugin)
        _register(manager, plugin, getattr(plugin, "__name__", type(plugin).__name__))
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}; the hooks are listed in paged_core/hookspecs.py") from error
    return manager


def _load(entry_point: EntryPoint) -> Any:
    try:
        return entry_point.load()
    except Exception as error:
        whose = entry_point.dist.name if entry_point.dist is not None else entry_point.value
        raise PluginError(
            f"the installed plugin {entry_point.name!r} of {whose} can't be loaded: {error!r}; uninstall or repair it"
        ) from error


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    if isinstance(plugin, type):
        raise PluginError(f"plugin {name!r} is a class; give an instance of it, or a module")
    try:
        manager.register(plugin, name if not manager.has_plugin(name) else f"{name} ({id(plugin):#x})")
    except (ValueError, pluggy.PluginValidationError) as error:
        raise PluginError(f"plugin {name!r} can't be used: {error}") from error


def check_whole(answer: Any, missing: Sequence[str], hook: str) -> None:
    """Refuse an ``answer`` to ``hook`` that lacks members which its role requires: ``missing``.

    Raises:
        PluginError: something is missing. Without this check, each step that needs it would fail that step's requests.
    """
    if missing:
        what = f"{type(answer).__name__}, which answers {hook}"
        raise PluginError(f"{what}, lacks {', '.join(missing)}; docs/plugins.md shows a whole one")


def describe(manager: pluggy.PluginManager) -> str:
    """Return the names of the loaded plugins, for error messages."""
    return ", ".join(name for name, _ in manager.list_name_plugin())

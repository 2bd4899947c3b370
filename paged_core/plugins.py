"""Loads plugins: built-in ones, installed ones (entry-point group ``paged_core``), and those the caller gives."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

from paged_core import hookspecs
from paged_core.errors import PluginError

if TYPE_CHECKING:
    import argparse

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

BUILTIN = (
    "paged_core.builtin.attention",
    "paged_core.builtin.forwards",
    "paged_core.builtin.sampler",
    "paged_core.builtin.scheduling",
)


def load_plugins(extra: Iterable[Any] = ()) -> pluggy.PluginManager:
    """A new plugin manager. Later ones are asked first: built-ins, then installed plugins, then ``extra``.

    Raises:
        PluginError: a plugin can't be imported, or implements a hook that doesn't exist.
    """
    manager = pluggy.PluginManager("paged_core")
    manager.add_hookspecs(hookspecs)
    for name in BUILTIN:
        manager.register(importlib.import_module(name), name)
    try:
        manager.load_setuptools_entrypoints("paged_core")
    except Exception as error:
        raise PluginError(f"an installed plugin can't be loaded: {error!r}; uninstall or repair it") from error
    for plugin in extra:
        manager.register(plugin)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}; the hooks are listed in paged_core/hookspecs.py") from error
    return manager


def describe(manager: pluggy.PluginManager) -> str:
    """The names of the loaded plugins, for error messages."""
    return ", ".join(name for name, _ in manager.list_name_plugin())

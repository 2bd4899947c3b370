"""Observers: calls the plugins that observe requests and steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from paged_core.interrupts import interrupts_the_process
from paged_core.plugins import Plugins

_log = logging.getLogger("paged_core")
_HOOKS = ("on_request_added", "on_step_finished", "on_request_finished", "on_prefix_cache_changed")


class Observers:
    """Calls all observers. An exception of one is logged, and affects neither the engine nor the others."""

    def __init__(self, manager: Plugins) -> None:
        self._hooks = {name: _one_each(getattr(manager.hook, name)) for name in _HOOKS}

    def listen_to(self, hook: str) -> bool:
        """Return whether any plugin answers the hook."""
        return bool(self._hooks[hook])

    def tell(self, hook: str, **what: Any) -> None:
        for call in self._hooks[hook]:
            try:
                call(**what)
            except BaseException as error:
                if interrupts_the_process(error):
                    raise
                _log.exception("a plugin's %s failed", hook)


def _one_each(hook: Any) -> list[Callable[..., object]]:
    """Return a function for each plugin that answers the hook, because after an exception pluggy would not call the
    others. If there are wrappers, which must run around all others, return one call for all."""
    implementations = list(reversed(hook.get_hookimpls()))  # the last registered one first, as pluggy calls them
    if any(each.wrapper or each.hookwrapper for each in implementations):
        return [hook]
    return [partial(_call, each.function, each.argnames) for each in implementations]


def _call(function: Callable[..., object], names: Sequence[str], **what: Any) -> None:
    function(*(what[name] for name in names))

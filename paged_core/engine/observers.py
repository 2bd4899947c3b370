"""Observers: the plugins that hear of requests and steps."""

from __future__ import annotations

import logging
from typing import Any

from paged_core.plugins import Plugins

_log = logging.getLogger("paged_core")
_HOOKS = ("on_request_added", "on_step_finished", "on_request_finished")


class Observers:
    """Tells those who watch. One that raises is logged and changes nothing."""

    def __init__(self, manager: Plugins) -> None:
        hooks = {name: getattr(manager.hook, name) for name in _HOOKS}
        self._hooks = {name: hook for name, hook in hooks.items() if hook.get_hookimpls()}

    def tell(self, hook: str, **what: Any) -> None:
        if hook in self._hooks:
            try:
                self._hooks[hook](**what)
            except Exception:
                _log.exception("a plugin's %s failed", hook)

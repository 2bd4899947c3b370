"""The twin's root through torch.compile, as long as that works. This file knows modules, not attention."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BACKEND: Any = "inductor"  # of torch.compile

_log = logging.getLogger("paged_core")


class CompiledRoot:
    """Calls ``root`` compiled, as one graph; uncompiled after the compiler has failed."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._compiled: Callable[..., Any] | None = torch.compile(root, backend=BACKEND, dynamic=True, fullgraph=True)

    def __call__(self, rewind: Callable[[], None], **given: Any) -> Any:
        """``rewind`` is called before a second try."""
        if self._compiled is None:
            return self._root(**given)
        try:
            return self._compiled(**given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            rewind()
            output = self._root(**given)  # raises errors that are not the compiler's
            told = str(error).partition("\n")[0]  # the rest is for the compiler's developers
            _log.warning("the model runs without torch.compile, which failed: %s: %s", type(error).__name__, told)
            self._compiled = None
            return output

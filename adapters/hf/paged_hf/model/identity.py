"""Which model it is: equal only where forwards compute the same, in this process or another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from paged_core import fingerprint
from paged_hf.model.reach import Reach

_PLAIN = (bool, int, float, str, type(None))


def identity(model: nn.Module, reach: Reach) -> str:
    """Of all weights, buffers (rotary tables among them) and settings that ``reach`` has found, and of the code's
    release. Reads all of it."""
    settings = [_settings(module) for module in reach.modules]
    config: Any = model.config
    return fingerprint(_tensors(reach), config.to_json_string(), settings, transformers.__version__, torch.__version__)


def _tensors(reach: Reach) -> Iterator[Tensor]:
    for module in reach.modules:
        for own in (module._parameters, module._buffers):
            yield from (tensor for tensor in own.values() if tensor is not None)
    yield from reach.loose.values()


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Its kind, what its weights are called, and its plain attributes: a scale that somebody has changed, say."""
    names = [name for own in (module._parameters, module._buffers) for name in own]
    plain = sorted(
        (name, repr(value)) for name, value in vars(module).items() if type(value) in _PLAIN and name != "training"
    )
    return (type(module).__module__, type(module).__qualname__, names, plain)

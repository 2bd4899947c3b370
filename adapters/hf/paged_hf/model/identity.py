"""The identity of a model: equal only if forwards compute the same, in this process or another."""

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
    """A digest of all weights, buffers (rotary tables included) and settings that ``reach`` has found, and of the
    code's release. Reads all of them."""
    settings = [_settings(module) for module in reach.modules]
    config: Any = model.config
    return fingerprint(_tensors(reach), config.to_json_string(), settings, transformers.__version__, torch.__version__)


def _tensors(reach: Reach) -> Iterator[Tensor]:
    for module in reach.modules:
        for own in (module._parameters, module._buffers):
            yield from (tensor for tensor in own.values() if tensor is not None)
    yield from reach.loose.values()


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Its class, the names of its weights, and its plain attributes, such as a changed scale."""
    names = [name for own in (module._parameters, module._buffers) for name in own]
    plain = sorted(
        (name, repr(value)) for name, value in vars(module).items() if type(value) in _PLAIN and name != "training"
    )
    return (type(module).__module__, type(module).__qualname__, names, plain)

"""Finds work that would make the host wait for its device, before it does. Such work can't be captured.

This file knows torch's operators by name, and sees from their arguments whether they would wait. It runs those that
don't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = {  # the host needs the values or sizes of their results
    "_local_scalar_dense", "_unique", "_unique2", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
_INDEXING = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
_COPYING = {"_to_copy", "copy_", "to"}


class NoWaits(TorchDispatchMode):
    """While this mode is entered, work of this thread that would wait for a device of this type raises RuntimeError."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Keep compiled code compiled: with other modes, torch.compile would run it uncompiled from then on."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """The same for later releases of torch."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        given |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        name = func.name().removeprefix("aten::").split(".")[0]
        if self._waits(name, given):
            raise RuntimeError(f"it waits for its device, in {func.name()}")
        result = func(*args, **(kwargs or {}))
        if name in _COPYING and not given.get("non_blocking") and self._crosses(given, result):
            raise RuntimeError(f"it waits for its device, in {func.name()} between two devices")
        return result

    def _waits(self, name: str, given: Mapping[str, Any]) -> bool:
        if name == "repeat_interleave":
            return self._has(given.get("repeats")) and given.get("output_size") is None
        if name in _INDEXING:
            filled = given.get("values")
            if isinstance(filled, Tensor) and filled.numel() == 1 and filled.device.type == "cpu":
                return False  # it fills values where a mask is set, which needs no wait
            return any(index.dtype in (torch.bool, torch.uint8) for index in self._tensors(given.get("indices")))
        if name == "where":
            return "self" not in given and self._has(given["condition"])  # the one-argument form is nonzero
        return name in _WAITING and self._has(given)

    def _crosses(self, given: Mapping[str, Any], result: Any) -> bool:
        types = {leaf.device.type for leaf in tree_leaves([given, result]) if isinstance(leaf, Tensor)}
        return len(types) > 1 and self._device_type in types

    def _has(self, values: Any) -> bool:
        return bool(self._tensors(values))

    def _tensors(self, values: Any) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [leaf for leaf in leaves if leaf.device.type == self._device_type]

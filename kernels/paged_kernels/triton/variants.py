"""How a module of kernels declares which variants its launchers compile, so that these can be compiled without a GPU.

A module has ``variants(card)``, the variants that launchers use in practice, and may have ``more_variants(card)``, all
others. A card is ``sm_80``, ``sm_90`` or ``hip``, as in ``tiles.card_of``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # names in Triton's signatures
FUSION = {"enable_fp_fusion": True}  # set at each launch: Triton 3.9 warns without it, 3.10 has another default
_OPTIONS = frozenset({"num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "waves_per_eu"})


class Variant(NamedTuple):
    """One kernel as one launch compiles it."""

    kernel: Any  # made by triton.jit
    signature: Mapping[str, str]  # parameter -> "*bf16", "i32", "i32:16" (known to be a multiple of 16), "fp32"
    constexprs: Mapping[str, Any]  # the other parameters' values
    options: Mapping[str, Any]  # num_warps, num_stages, ...

    @classmethod
    def of(cls, kernel: Any, signature: Mapping[str, str], tile: Mapping[str, Any]) -> Variant:
        """Return a variant. ``tile`` holds constexprs and options together, as a launch takes them."""
        options = {name: value for name, value in tile.items() if name in _OPTIONS}
        return cls(kernel, signature, {name: v for name, v in tile.items() if name not in _OPTIONS}, options)


Variants = Iterator[Variant]


def row_stride(rows: Tensor) -> int:
    """Return the stride from row to row of ``[R,N]``. For a single row torch's may be anything, and Triton would
    compile for each kind of stride."""
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]

"""How a module of kernels says what its launchers ask Triton's compiler for, so that it can be tried without a GPU.

A module offers ``variants(card)``, what launchers ask for in practice, and may offer ``more_variants(card)``, the
rest. A card is ``sm_80``, ``sm_90`` or ``hip``, as ``tiles.card_of`` says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # as signatures have them
FUSION = {"enable_fp_fusion": True}  # to be said at each launch: Triton 3.9 warns of it, 3.10 has another default
_OPTIONS = frozenset({"num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "waves_per_eu"})


class Variant(NamedTuple):
    """One kernel as one launch compiles it."""

    kernel: Any  # of triton.jit
    signature: Mapping[str, str]  # parameter -> "*bf16", "i32", "i32:16" (known to be a multiple of 16), "fp32"
    constexprs: Mapping[str, Any]  # the other parameters' values
    options: Mapping[str, Any]  # num_warps, num_stages, ...

    @classmethod
    def of(cls, kernel: Any, signature: Mapping[str, str], tile: Mapping[str, Any]) -> Variant:
        """``tile`` holds constexprs and options together, as a launch takes them."""
        options = {name: value for name, value in tile.items() if name in _OPTIONS}
        return cls(kernel, signature, {name: v for name, v in tile.items() if name not in _OPTIONS}, options)


Variants = Iterator[Variant]


def row_stride(rows: Tensor) -> int:
    """From row to row of ``[R,N]``. Of a single row torch may say anything, and each kind of stride is compiled for."""
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]

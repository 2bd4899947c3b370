"""How a module of kernels says what its launchers ask Triton's compiler for, so that it can be tried without a GPU.

A module offers ``variants()``, what launchers ask for in practice, and may offer ``more_variants()``, the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

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

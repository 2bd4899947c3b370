"""Packed products of the dtypes named, beside torch's: prints "right" or "wrong" for each.

Usage: python products_in_one_process.py float32 bfloat16
"""

from __future__ import annotations

import sys

import torch

from paged_kernels.cpu import fma
from paged_kernels.cpu.linear import PackedLinear

x, weight = torch.randn(5, 96), torch.randn(64, 96)
for name in sys.argv[1:]:
    product = {"float32": fma.FLOAT32, "bfloat16": fma.WIDENED}[name]
    rounded = weight.to(product.dtype)
    got = PackedLinear([rounded], [None], product=product)(x)
    print("right" if torch.allclose(got, x @ rounded.float().T, atol=1e-3) else "wrong")

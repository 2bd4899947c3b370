"""Kernels whose helpers have the same Python name: prints what each of the named kernels stores.

Usage: python kernels_in_one_process.py 2 3
"""

from __future__ import annotations

import sys

import torch

from paged_kernels.cpu import memory, parallel
from paged_kernels.cpu.intrinsics import inline

# The helper is long, so that it stays a separate function in the compiled code, and reads zeros only. It is a global,
# because numba does not cache functions with a helper in a closure.
SOURCE = f"""
@inline
def helper(address, number):
    {"number ^= load_i64(address, number & 7); " * 100}
    return number + base

def store(address):
    store_i64(address, 0, helper(address, 3) + helper(address, 4))
"""

for base in map(int, sys.argv[1:]):
    scope = {**vars(memory), "inline": inline, "base": base}
    exec(compile(SOURCE, f"kernels_{base}.py", "exec"), scope)  # numba caches it under its file name
    numbers = torch.zeros(8, dtype=torch.int64)
    parallel.kernel(scope["store"]).here(numbers.data_ptr())
    print(numbers[0].item())

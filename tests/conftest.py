"""One thread for the tests' small tensors: two threads that wait for each other on a busy machine take far longer.

Where there is no GPU, Triton's kernels are interpreted. Triton asks for that when it is imported, so it is said here.
"""

import os

import torch

from longest_first import pytest_collection_modifyitems
from nothing_skipped import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_collection_modifyitems", "pytest_make_collect_report", "pytest_runtest_makereport"]

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

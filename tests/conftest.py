"""One thread for the tests' small tensors: two threads that wait for each other on a busy machine take far longer.

No example is timed either: a busy machine, or one that measures coverage, is slow and not wrong.

Where there is no GPU, Triton's kernels are interpreted. Triton asks for that when it is imported, so it is said here.

No garbage is looked for while tests are collected: all that is imported then stays. It is left out afterwards too, or
each search would go through a million objects of other people's modules.
"""

import gc
import os

gc.disable()

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from longest_first import pytest_collection_modifyitems  # noqa: E402
from nothing_skipped import pytest_make_collect_report, pytest_runtest_makereport  # noqa: E402

__all__ = ["pytest_collection_modifyitems", "pytest_make_collect_report", "pytest_runtest_makereport"]

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()

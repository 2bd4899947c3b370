"""Settings of the whole suite. Tests use one thread for their small tensors: on a busy machine two threads that wait
for each other take far longer.

hypothesis does not time its examples, because a busy machine, or one that measures coverage, is slow but not wrong.

Without a GPU, Triton's kernels are interpreted. Triton reads that setting when it is imported, so it is set here.

The garbage collector is off while tests are collected, because everything that is imported then stays. Those objects
are frozen afterwards too; otherwise each collection would go through a million objects of other people's modules.
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

"""Memory for packed weights: tensors are apart from each other, and their memory goes back."""

import mmap
import platform
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from paged_kernels.cpu import pages

SHAPES = [(3, 5), (7,), (1000, 1000), (64, 33, 16), (9_000_000,), (2, 2)]  # in chunks, and one larger than a chunk


def fill_and_read(shapes, dtype):
    tensors = [pages.empty(shape, dtype).fill_(number) for number, shape in enumerate(shapes)]
    return [(tuple(t.shape), t.dtype, t.unique().tolist(), t.data_ptr() % 64) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_dont_share_memory(dtype):
    want = [(shape, dtype, [number], 0) for number, shape in enumerate(SHAPES)]
    assert fill_and_read(SHAPES, dtype) == want


def test_threads_dont_share_memory():
    shapes, got = [(100 + n,) for n in range(50)], {}

    def work(name):
        got[name] = fill_and_read(shapes, torch.float32)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = [(shape, torch.float32, [number], 0) for number, shape in enumerate(shapes)]
    assert got == dict.fromkeys(range(4), want)


def test_memory_goes_back_with_the_last_tensor():
    before = psutil.Process().memory_info().rss
    tensors = [pages.empty((50 << 20,), torch.int8).zero_() for _ in range(4)]
    held = psutil.Process().memory_info().rss
    assert held - before > 150 << 20
    tensors.clear()
    assert held - psutil.Process().memory_info().rss > 150 << 20


def test_a_system_without_huge_pages_gives_usual_memory(monkeypatch):
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert fill_and_read(SHAPES[:4], torch.float32)[2][2] == [2]


@pytest.mark.parametrize("shape", [(0,), (0, 7)])
def test_nothing_takes_nothing(shape):
    assert pages.empty(shape, torch.float32).shape == shape


def of_file(folder, numbers):
    path = folder / "weights"
    numbers.numpy().tofile(path)
    return torch.from_file(str(path), size=numbers.numel(), dtype=numbers.dtype)


def test_pages_of_a_file_go_and_read_the_same_afterwards(tmp_path):
    numbers = torch.randn(1 << 18)  # 1 MiB
    mapped = of_file(tmp_path, numbers)
    mapped.sum()  # now they are in memory
    whole = mapped[: 1 << 17]
    assert pages.forget(whole) == (whole.numel() * 4 if sys.platform == "linux" else 0)
    assert torch.equal(mapped, numbers)


def test_pages_that_were_written_to_and_memory_of_no_file_stay(tmp_path):
    numbers = torch.randn(1 << 18)
    mapped = of_file(tmp_path, numbers)
    mapped[5] = 7.0
    assert pages.forget(mapped) == 0
    assert mapped[5] == 7.0
    own = numbers.clone()
    assert pages.forget(own) == 0
    assert torch.equal(own, numbers)
    assert pages.forget(mapped[3:4]) == 0, "less than a page"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_memory_that_lies_between_blocks_that_stay_goes_back_to_the_system():
    def in_memory():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 MB, in blocks too small for mappings of their own
    stays = blocks[::100]
    del blocks
    before = in_memory()
    pages.let_go(100_000_000)
    assert in_memory() < before - 50_000_000
    assert all(bool((each == 1).all()) for each in stays)

"""Launching kernels: on torch's threads, without them, compiled once, and where nothing can be written."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from paged_kernels.cpu import launch, parallel
from paged_kernels.cpu.memory import fetch_add, store_i64
from places import TESTS

numbers = torch.zeros(64, dtype=torch.int64)


def _count(args):
    store_i64(args, 8 + fetch_add(args, 1), 1)


_count_in = parallel.kernel(_count)


def test_every_thread_of_a_launch_runs_the_kernel_once():
    numbers.zero_()
    _count_in(numbers.data_ptr(), 3)
    assert numbers[0] == 3 and numbers[8:].sum() == 3


def test_without_an_openmp_library_the_calling_thread_does_the_work(monkeypatch):
    _count_in.compile()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: (_ for _ in ()).throw(OSError(path)))
    monkeypatch.setattr(parallel, "_launch", parallel._find_launcher())
    numbers.zero_()
    _count_in(numbers.data_ptr(), 3)
    assert numbers[0] == 1


def test_warming_up_tells_its_progress_and_leaves_nothing_to_compile():
    seen = []
    launch.warm_up(lambda what, done, total: seen.append((done, total)))
    assert seen[0] == (0, seen[-1][1]) and seen[-1][0] == seen[-1][1]
    assert launch.kernels.store_and_attend.is_compiled


def test_kernels_for_codes_are_compiled_only_for_who_has_them():
    script = (
        "import torch\n"
        "from paged_kernels.cpu import launch\n"
        "all = (launch.kernels.store_and_attend, launch.kernels.store_and_attend_codes)\n"
        "for dtype in (torch.float32, torch.int8):\n"
        "    launch.warm_up(cache_dtype=dtype)\n"
        "    print([each.is_compiled for each in all])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[True, False]", "[True, True]"]


COUNTING = (
    "from paged_kernels.cpu import items, parallel\n"
    "from numba.core import ccallback\n"
    "counts = []\n"
    "compile_anew = ccallback.CFunc._compile_uncached\n"
    "ccallback.CFunc._compile_uncached = lambda self: counts.append(1) or compile_anew(self)\n"
    "items.plan_items.compile()\n"
    "print(len(counts))"
)


def test_of_processes_that_start_together_one_compiles_and_later_ones_load_from_disk(tmp_path):
    counts = []
    for num_processes in (3, 1):
        environment = {"PAGED_CORE_CACHE": str(tmp_path), "PATH": ""}
        command = [sys.executable, "-c", COUNTING]
        started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(num_processes)]
        counts.append([int(process.communicate(timeout=300)[0]) for process in started])
    assert sorted(counts[0]) == [0, 0, 1] and counts[1] == [0]


def test_where_no_folder_can_be_written_kernels_are_compiled_all_the_same(monkeypatch, tmp_path):
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setattr(parallel, "_cache_parents", lambda: [blocked])
    assert parallel.cache_folder() is None
    fresh = parallel.kernel(_count)
    numbers.zero_()
    fresh(numbers.data_ptr(), 1)
    assert numbers[0] == 1


@pytest.mark.parametrize("variable", ["PAGED_CORE_CACHE", "XDG_CACHE_HOME"])
def test_the_cache_goes_where_the_environment_says(variable, monkeypatch, tmp_path):
    monkeypatch.delenv("PAGED_CORE_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = parallel.cache_folder()
    assert folder is not None and tmp_path in folder.parents


def test_a_folder_that_others_may_write_to_is_not_trusted(monkeypatch, tmp_path):
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    monkeypatch.setattr(parallel, "_cache_parents", lambda: [open_folder])
    assert parallel.cache_folder() is None


def test_a_cache_file_cut_short_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("PAGED_CORE_CACHE", str(tmp_path))
    parallel.kernel(_count).compile()
    for file in tmp_path.rglob("*.nb?"):
        file.write_bytes(file.read_bytes()[:200])
    again = parallel.kernel(_count)
    numbers.zero_()
    again(numbers.data_ptr(), 1)
    assert numbers[0] == 1


def test_kernels_that_different_processes_compiled_keep_their_own_helpers(tmp_path, monkeypatch):
    """What is kept on disk calls its helpers by name, and in a process that loads both a name is one function."""
    monkeypatch.setenv("PAGED_CORE_CACHE", str(tmp_path))
    for bases in ([2], [3], [2, 3]):
        command = [sys.executable, str(TESTS / "kernels_in_one_process.py"), *map(str, bases)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [int(stored) for stored in done.stdout.split()] == [7 + 2 * base for base in bases]

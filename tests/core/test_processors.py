"""A container's share of the processors, as control groups tell it; and what `paged` does about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paged_core.processors import cpu_share


def told(folder: Path, lines: str, files: dict[str, str]) -> float | None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "cgroup").write_text(lines)
    return cpu_share(folder / "groups", folder / "cgroup")


V2, V1 = "0::/a/b\n", "5:memory:/x\n4:cpu,cpuacct:/a/b\n0::/\n"
V1_FILES = {"quota": "300000", "period": "100000"}


@pytest.mark.parametrize(
    ("lines", "files", "share"),
    [
        (V2, {"groups/a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"groups/a/b/cpu.max": "max 100000\n"}, None),
        (V2, {"groups/a/b/cpu.max": "400000 100000\n", "groups/a/cpu.max": "200000 100000\n"}, 2.0),
        (V2, {"groups/cpu.max": "50000 100000\n"}, 0.5),  # what a container sees of itself
        (V1, {f"groups/cpu,cpuacct/a/b/cpu.cfs_{name}_us": text for name, text in V1_FILES.items()}, 3.0),
        (V1, {"groups/cpu/cpu.cfs_quota_us": "100000", "groups/cpu/cpu.cfs_period_us": "50000"}, 2.0),
        (V1, {"groups/cpu/cpu.cfs_quota_us": "-1", "groups/cpu/cpu.cfs_period_us": "100000"}, None),
        (V2, {"groups/a/b/cpu.max": "nonsense"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_the_smallest_share_of_all_groups_counts(
    tmp_path: Path, lines: str, files: dict[str, str], share: float | None
) -> None:
    assert told(tmp_path, lines, files) == share


def test_without_control_groups_nothing_is_said(tmp_path: Path) -> None:
    assert cpu_share(tmp_path, tmp_path / "none") is None


PROGRAM = """
import os, sys
from pathlib import Path
from paged_core import processors
folder = Path(sys.argv[1])
processors.cpu_share.__defaults__ = (folder / "groups", folder / "cgroup")
processors._num_processors = lambda: 4
processors.settle_threads()
print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_SPINCOUNT"))
if "--torch" in sys.argv:
    import torch
    print(torch.get_num_threads())
"""


def threads_and_spins(folder: Path, *options: str, **environment: str) -> str:
    """As torch and its OpenMP will read them; with ``--torch`` also torch's own word, which takes seconds to import."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", PROGRAM, str(folder), *options]
    done = subprocess.run(command, env={**cleared, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_torch_has_as_many_threads_as_there_are_processors_for_them(tmp_path: Path) -> None:
    told(tmp_path, V2, {"groups/a/b/cpu.max": "180000 100000\n"})
    assert threads_and_spins(tmp_path, "--torch") == "2 300\n2"
    told(tmp_path, V2, {"groups/a/b/cpu.max": "150000 100000\n"})
    assert threads_and_spins(tmp_path) == "1 300"
    assert threads_and_spins(tmp_path, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="7") == "2 7", "what the user says stays"
    assert threads_and_spins(tmp_path, OMP_WAIT_POLICY="active") == "1 None"

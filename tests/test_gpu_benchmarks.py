"""The GPU's benchmarks, tiny, come to their ends and are read: a GPU's minutes are no place for a typo.

Where there is no GPU they run on the CPU. In one process: most of what each takes by itself is importing torch.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interpreter import DEVICE

ROOT = Path(__file__).resolve().parents[1]
ON_DEVICE = ["--device", str(DEVICE)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call a benchmark's main with arguments; what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return call


def parts(path: Path) -> list[str]:
    return list(dict.fromkeys(row["part"] for row in json.loads(path.read_text())["rows"]))


def test_each_benchmark_comes_to_its_end_and_the_table_shows_it(run, tmp_path):
    kernels, offline = tmp_path / "gpu-kernels.json", tmp_path / "gpu-offline-7b.json"
    run("bench_gpu_kernels", *ON_DEVICE, "--tiny", "--repeats", 1, "--json", kernels)
    assert parts(kernels) == ["decode", "prefill", "store", "helpers", "flex"]
    run("bench_gpu", *ON_DEVICE, "--models", "tiny", "--requests", 4, "--longest", 12, "--json", offline)
    told = run("bench_gpu_tiles", *ON_DEVICE, "--tiny", "--repeats", 1, "--json", tmp_path / "tiles.json")
    assert "as chosen" in told and "failed" not in told
    table = run("gpu_table", tmp_path)
    assert "decode 2 x 40" in table and "prefill 1 x 20 of 60" in table and "tiny: " in table


def test_what_was_measured_before_a_benchmark_was_cut_short_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_gpu_kernels")

    def cut_short(options, bandwidth):
        yield {"us": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(bench._PARTS, "decode", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run("bench_gpu_kernels", *ON_DEVICE, "--only", "decode", "--json", tmp_path / "kernels.json")
    assert parts(tmp_path / "kernels.json") == ["decode"]


def test_a_rival_that_fails_is_said_and_the_rest_are_timed(run, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    timing, device = importlib.import_module("gpu_race"), torch.device("cpu")
    assert list(timing.race({"paged": lambda: None, "sdpa": lambda: 1 / 0}, 1, device)) == ["paged"]
    assert "sdpa failed: division by zero" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        timing.race({"paged": lambda: 1 / 0}, 1, device)


def test_where_no_kernel_runs_the_script_says_so_at_once(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no kernel runs here" in done.stdout
    assert "checks" not in done.stdout and (tmp_path / "probe.log").is_file()

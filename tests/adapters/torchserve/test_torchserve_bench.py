"""The benchmark beside a stock-style handler: a short run to its end, and one that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny_folder
from places import ROOT

BENCH = ROOT / "benchmarks" / "bench_torchserve.py"


@pytest.fixture
def temp() -> Iterator[Path]:
    """A short path: TorchServe's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder)


def start(tmp_path: Path, temp: Path, *options: str) -> subprocess.Popen[str]:
    model = tiny_folder.save(tmp_path / "model")
    command = [sys.executable, BENCH, "--model", model, "--clients", "3", "--rounds", "1", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temp)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def left_behind(temp: Path) -> list[str]:
    told = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    return [line for line in told if str(temp) in line] + [each.name for each in temp.glob("bench-torchserve-*")]


def test_a_short_run_ends_with_what_it_ran_on_and_texts_that_agree(tmp_path, temp):
    out = tmp_path / "out.json"
    sizes = ["--requests", "4", "--tokens", "8", "--min-tokens", "8", "--beside", "stock8"]
    with start(tmp_path, temp, *sizes, "--json", str(out)) as process:
        told, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "tokens_per_s" in told
    found = json.loads(out.read_text())
    assert found["date"].startswith("20")
    assert found["hardware"]["cores"] == os.cpu_count()
    assert found["versions"]["torchserve"] and found["versions"]["java"] >= 17
    assert {name: each["texts_equal_to_paged"] for name, each in found["results"].items()} == {
        "stock8": 1.0, "paged": 1.0,
    }  # fmt: skip
    paged, batched = (found["results"][name]["tokens_per_s"] for name in ("paged", "stock8"))
    assert found["ratios"]["stock8"]["tokens_per_s"] == paged / batched
    assert set(found["ratios"]["stock8"]) == {"tokens_per_s", "latency_p95_s", "first_text_p50_s"}
    assert left_behind(temp) == []


def test_a_run_that_is_told_to_end_ends_at_once_and_leaves_nothing_behind(tmp_path, temp):
    with start(tmp_path, temp, "--requests", "1000", "--tokens", "200", "--beside", "stock1") as process:
        assert process.stderr is not None
        while "stock1: 2 requests" not in (line := process.stderr.readline()):  # clients wait for answers from now on
            assert line, "it has ended"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert time.monotonic() - began < 60
        assert "Traceback" not in process.stderr.read()
    assert left_behind(temp) == []

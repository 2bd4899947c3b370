"""Every kernel compiles for cards that aren't here, within their limits: no GPU is needed, and none is used."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paged_kernels
from paged_kernels.triton import compile

FOLDER = Path(paged_kernels.__path__[0]) / "triton"
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


def python(*arguments, **environment):
    """A new interpreter: this one has Triton interpret its kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=500)


def check(*arguments, **environment):
    return python("-m", "paged_kernels.triton.compile", *arguments, **environment)


@pytest.fixture(scope="module")
def compiled():
    done = check("--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["compiled"]


def launched():
    """The kernels that the package's launchers start: ``kernel[grid](...)``."""
    calls = [
        node.func.value
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    names = [call.id if isinstance(call, ast.Name) else call.attr for call in calls if hasattr(call, "id") or
             hasattr(call, "attr")]  # fmt: skip
    return {name.strip("_") for name in names}


def test_every_kernel_that_is_launched_compiles_for_every_card(compiled):
    assert len(launched()) > 5
    for target in SHARED:
        assert launched() - {each["kernel"] for each in compiled if each["target"] == target} == set()


def test_what_was_compiled_fits_the_cards(compiled):
    for each in compiled:
        assert each["shared_bytes"] <= SHARED[each["target"]], each
        assert each["registers"] <= (512 if each["target"] == "gfx942" else 255), each
        assert each["spill_bytes"] <= 16, each  # what may spill more, head dims beyond 128, only --all compiles


COMPLAINTS = """
import sys
from paged_kernels.triton import compile, elementwise

signature = {"x": "*fp32", "x_row": "i32", "weight": "*fp32", "out": "*fp32", "width": "i32", "eps": "fp32"}
tile = {"BLOCK": 4096, "num_warps": 1, "maxnreg": 24, "waves_per_eu": 8}
variant = compile.Variant.of(elementwise._rms_norm, signature, tile)
for target in compile.CARDS:
    print("spilling:", compile.compile_variant(variant, target).complaints)
print("unknown:", compile.main(["--target", "sm_80,sm_12"]))
compile.CARDS["sm_80"] = compile.CARDS["sm_80"]._replace(max_registers=8)
compile._compiled = lambda todo, n: (compile.run(job) for job in todo[:1])
sys.exit(compile.main(["--target", "sm_80", "--kernel", "elementwise"]))
"""


@pytest.fixture(scope="module")
def complaints():
    """Three things to complain of, in one interpreter: starting one takes longer than they do."""
    return python("-c", COMPLAINTS)


def test_a_kernel_that_gets_too_few_registers_is_complained_of(complaints):
    told = [line for line in complaints.stdout.splitlines() if line.startswith("spilling: ")]
    assert len(told) == 3, complaints.stderr
    assert all("are spilled" in line for line in told), told


def test_a_broken_limit_is_the_commands_exit_status(complaints):
    assert complaints.returncode == 1, complaints.stderr
    assert "registers, 8 are allowed" in complaints.stderr
    assert "\nkernel" in complaints.stdout


def test_the_command_says_what_it_cannot_do(complaints, monkeypatch, capsys):
    assert "unknown: 2\n" in complaints.stdout
    assert "no such target: sm_12; there are sm_80, sm_90, gfx942" in complaints.stderr
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err

"""The adapter also works with the oldest transformers that pyproject.toml allows: a sample of its tests, run with that.

`make matrix` runs all of them, on the oldest of everything. This one notices earlier: with each `make test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from declared import EXTRAS
from places import ROOT

# The seam and its self-check, calls in each tier, 16-bit weights, the paged cache, models with rules of their own.
# Mistakes of ours are told from rounding by our own comparison, whatever the release.
SAMPLE = (
    "test_hf_upstream.py",
    "test_generate_halves.py",
    "test_hf_cache.py",
    "test_hf_cache_layers.py",
    "test_hf_rules.py",
)
# Left out: what no release changes (mistakes of ours, our own sources), and what takes long (a real model, float16).
LEFT_OUT = ("mistake", "real_model", "spells", "calls_transformers_by_names", "float16")
LIMIT_S = 1200


def oldest() -> str:
    """``transformers==5.18``"""
    (line,) = (line for line in EXTRAS["hf"] if Requirement(line).name == "transformers")
    (lowest,) = (bound.version for bound in Requirement(line).specifier if bound.operator == ">=")
    return f"transformers=={lowest}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that release, and with those of its requirements that are installed here in no fitting release."""
    folder = tmp_path_factory.mktemp("oldest") / "packages"
    pip("--no-deps", "--target", folder, oldest())
    (release,) = distributions(name="transformers", path=[str(folder)])
    unfit = [line for line in release.requires or () if not installed(Requirement(line))]
    if unfit:
        pip("--no-deps", "--target", folder, *unfit)
    return folder


def pip(*arguments: str | Path) -> None:
    # Not compiled: few of these modules are ever imported here, and the first interpreter that does keeps them.
    shown = ("--quiet", "--disable-pip-version-check", "--no-compile")
    command = [sys.executable, "-m", "pip", "install", *shown, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"this test installs from the package index\n{done.stderr}"


def installed(requirement: Requirement) -> bool:
    """Whether a release that fits is, or none is wanted: without an extra, or on this platform."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    try:
        return requirement.specifier.contains(version(requirement.name))
    except PackageNotFoundError:
        return False


def run(packages: Path, *command: str) -> str:
    """What Python prints, where those packages come before the installed ones."""
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command], env={**environment, "PYTHONPATH": path}, cwd=ROOT,
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def test_a_sample_of_the_adapters_tests_passes(packages: Path) -> None:
    told = run(packages, "-c", "from importlib.metadata import version; print(version('transformers'))")
    assert Requirement(oldest()).specifier.contains(told.strip())
    chosen = ("-k", " and ".join(f"not {name}" for name in LEFT_OUT))
    run(
        packages,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *chosen,
        *(f"tests/adapters/hf/{name}" for name in SAMPLE),
    )

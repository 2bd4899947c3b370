"""The adapter also works with the oldest transformers that pyproject.toml allows: a sample of its tests, run with that.

`make matrix` runs all of them, on the oldest of everything. This one notices earlier: with each `make test`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
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
CHOSEN_WITH_IT = ("transformers", "huggingface-hub", "tokenizers")  # pip finds those that go with it
LIMIT_S = 1200


def oldest() -> str:
    """``transformers==5.18``"""
    (line,) = (line for line in EXTRAS["hf"] if Requirement(line).name == "transformers")
    (lowest,) = (bound.version for bound in Requirement(line).specifier if bound.operator == ">=")
    return f"transformers=={lowest}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that release, and with what it needs in another release than is installed here."""
    folder = tmp_path_factory.mktemp("oldest")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in pins if line.split("==")[0] not in CHOSEN_WITH_IT]
    (folder / "constraints.txt").write_text("\n".join(others), encoding="utf-8")
    report = folder / "report.json"
    pip("--dry-run", "--ignore-installed", "--report", report, "-c", folder / "constraints.txt", oldest())
    wanted = [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
    names = [f"{each['name']}=={each['version']}" for each in wanted if installed(each["name"]) != each["version"]]
    pip("--no-deps", "--no-compile", "--target", folder / "packages", *names)
    return folder / "packages"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"this test installs from the package index\n{done.stderr}"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
    run(
        packages,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not mistake and not real_model",
        *(f"tests/adapters/hf/{name}" for name in SAMPLE),
    )

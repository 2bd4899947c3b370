"""An environment with nothing but Python, torch and what pip installs: what a new user has after an install.

pip is first asked what it would install. Distributions that the tests' own environment has in the same release are then
linked from there, because unpacking and compiling them again would take longer than all that the tests check. torch,
which is gigabytes, is linked before pip is asked. pip then sees both as installed, and installs the rest from the
index.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from places import ROOT

OUR_NAME = "paged-core"
# Variables that change what an interpreter finds, name folders of ours, or make it compile its imports each time.
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PAGED_CORE_CACHE", "PYTHONDONTWRITEBYTECODE")


def build_wheel(folder: Path) -> Path:
    """Build our wheel, as the index would have it."""
    _pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("paged_core-*.whl")
    return wheel


class CleanEnvironment:
    """Use it as ``CleanEnvironment(folder, wheel).install("pip install 'paged-core[cpu,hf]'")``."""

    def __init__(self, folder: Path, wheel: Path, lent: Sequence[str] = ("torch",)) -> None:
        venv.create(folder / "env", symlinks=True)
        self.folder, self.wheel, self.bin = folder, wheel, folder / "env" / "bin"
        self.variables = {name: value for name, value in os.environ.items() if name not in _OURS}
        self.variables |= {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PAGED_CORE_CACHE": str(folder / "cache"),
        }
        (self._packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        for name in lent:
            _lend_with_requirements(self._packages, name)

    def install(self, command: str) -> None:
        """Run a line ``pip install ...`` of the docs. Our package is replaced by the wheel, and releases are those of
        the tests' own environment.

        Raises:
            AssertionError: pip failed; the message has its output, for example that no index can be reached.
        """
        program, verb, *what = shlex.split(command, comments=True)
        assert (program, verb) == ("pip", "install"), command
        what = [re.sub(r"^(\.|paged-core)(?=\[|$)", str(self.wheel), word) for word in what]
        # Modules are not compiled: few of them are ever imported here, and the first interpreter that imports one keeps
        # it.
        pip = ("--python", self.bin / "python", "install", "--no-compile")
        report = self.folder / "report.json"
        asked = ("-c", ROOT / "constraints.txt", "--dry-run", "--report", report, *what)
        _pip(*pip, *asked, env=self.variables)
        left = []
        for each in json.loads(report.read_text())["install"]:
            name, version = each["metadata"]["name"], each["metadata"]["version"]
            found = _installed(name)
            if found is not None and found.version == version and not _shares_a_folder(found):
                _lend(self._packages, found)
            else:
                left.append(self.wheel if name == OUR_NAME else f"{name}=={version}")
        if left:  # these are all that pip has chosen, so it need not resolve again
            _pip(*pip, "--no-deps", *left, env=self.variables)

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in a folder without any files of ours."""
        options = {"env": self.variables, "cwd": self.folder, "text": True, "timeout": 600, **options}
        done = subprocess.run([self._found(command[0]), *command[1:]], capture_output=True, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        options = {"env": self.variables, "cwd": self.folder, "text": True, **options}
        return subprocess.Popen([self._found(command[0]), *command[1:]], **options)

    def _found(self, program: str | Path) -> Path:
        """Return the program's path here, because ``subprocess`` would look for it in our own PATH."""
        return self.bin / program


def _pip(*arguments: str | Path, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    told = f"pip failed; this test installs from the package index, as users do:\n{shlex.join(command)}\n"
    assert done.returncode == 0, told + done.stdout[-3000:] + done.stderr[-5000:]


def _lend_with_requirements(packages: Path, name: str) -> None:
    """Link one of our distributions, and what it requires, into another environment's site-packages."""
    found = distribution(name)
    _lend(packages, found)
    for requirement in map(Requirement, found.requires or ()):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and not _has(packages, requirement.name):
            _lend_with_requirements(packages, requirement.name)


def _lend(packages: Path, found: Distribution) -> None:
    for top in _tops(found):
        if not (packages / top).exists():
            (packages / top).symlink_to(Path(str(found.locate_file(top))).resolve())


def _tops(found: Distribution) -> set[str]:
    """Return the top-level entries in site-packages, without programs."""
    return {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}


def _shares_a_folder(found: Distribution) -> bool:
    """Return whether it shares a folder with distributions that pip may not want. Ours does: it is installed as the
    folder of its sources."""
    tops = [Path(str(found.locate_file(top))) for top in _tops(found)]
    packages = [top for top in tops if top.is_dir() and top.suffix not in (".dist-info", ".libs")]
    return not packages or not all((package / "__init__.py").exists() for package in packages)


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _has(packages: Path, name: str) -> bool:
    there = (folder.name.split("-")[0] for folder in packages.glob("*.dist-info"))
    return canonicalize_name(name) in map(canonicalize_name, there)

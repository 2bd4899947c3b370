"""An environment that has nothing but Python, torch and what pip puts there: what a stranger has after an install.

torch and what torch requires are lent by the environment that runs the tests, as links: torch is gigabytes, everybody
who installs us gets it, and its release is the same in both (constraints.txt). pip sees it as installed. All the rest
comes from the index that the tests' own environment came from.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from places import ROOT

# What would change what an interpreter finds, name folders of ours, or have it compile what it imports each time.
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PAGED_CORE_CACHE", "PYTHONDONTWRITEBYTECODE")


def build_wheel(folder: Path) -> Path:
    """As the index would have it."""
    _pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("paged_core-*.whl")
    return wheel


class CleanEnvironment:
    """``CleanEnvironment(folder, wheel).install("pip install 'paged-core[cpu,hf]'")``"""

    def __init__(self, folder: Path, wheel: Path, lent: Sequence[str] = ("torch",)) -> None:
        venv.create(folder / "env", symlinks=True)
        self.folder, self.wheel, self.bin = folder, wheel, folder / "env" / "bin"
        self.variables = {name: value for name, value in os.environ.items() if name not in _OURS}
        self.variables |= {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PAGED_CORE_CACHE": str(folder / "cache"),
        }
        (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        for name in lent:
            _lend(packages, name)

    def install(self, command: str) -> None:
        """A line ``pip install ...`` of the docs, where our package is the wheel, and releases are those that the
        tests' own environment has.

        Raises:
            AssertionError: pip could not; with all that it said, for example that no index can be reached.
        """
        program, verb, *what = shlex.split(command, comments=True)
        assert (program, verb) == ("pip", "install"), command
        what = [re.sub(r"^(\.|paged-core)(?=\[|$)", str(self.wheel), word) for word in what]
        python = self.bin / "python"
        # Not compiled: few of these modules are ever imported here, and the first interpreter that does keeps them.
        _pip("--python", python, "install", "--no-compile", "-c", ROOT / "constraints.txt", *what, env=self.variables)

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """To its end, in a folder that has nothing of ours."""
        options = {"env": self.variables, "cwd": self.folder, "text": True, "timeout": 600, **options}
        done = subprocess.run([self._found(command[0]), *command[1:]], capture_output=True, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        options = {"env": self.variables, "cwd": self.folder, "text": True, **options}
        return subprocess.Popen([self._found(command[0]), *command[1:]], **options)

    def _found(self, program: str | Path) -> Path:
        """``subprocess`` would look for it in our own PATH."""
        return self.bin / program


def _pip(*arguments: str | Path, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    told = f"pip failed; this test installs from the package index, as users do:\n{shlex.join(command)}\n"
    assert done.returncode == 0, told + done.stdout[-3000:] + done.stderr[-5000:]


def _lend(packages: Path, name: str) -> None:
    """Link a distribution of ours, and what it requires, into another environment's site-packages."""
    found = distribution(name)
    for file in found.files or ():
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (packages / top).exists():
            (packages / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    for requirement in map(Requirement, found.requires or ()):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and not _has(packages, requirement.name):
            _lend(packages, requirement.name)


def _has(packages: Path, name: str) -> bool:
    there = (folder.name.split("-")[0] for folder in packages.glob("*.dist-info"))
    return canonicalize_name(name) in map(canonicalize_name, there)

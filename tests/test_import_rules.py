"""The table of docs/architecture.md, held: who imports whom, inside functions too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import paged_core
import paged_openai
import paged_serving
from imported_names import imports_of
from places import ROOT, sources

SHELVES = ("kernels", "adapters")
STDLIB = frozenset(sys.stdlib_module_names)


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


CORE = {"paged_core", "torch", "numpy", "pluggy"}
EVERYBODYS = {"paged_core.interrupts", "paged_core.roles"}  # they know the standard library only

# folder: (what its files may import beside the standard library, what they may not even so)
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "kernels/paged_kernels": (
        {"paged_kernels", "torch", "triton", "numba", "llvmlite", "numpy", "platformdirs"},
        set(),
    ),
    "paged_core/scheduling": ({"paged_core.scheduling"}, set()),
    "paged_core/execution": ({"paged_core.execution", "paged_core.scheduling", "torch", "numpy"} | EVERYBODYS, set()),
    "paged_core/sampling": (
        {"paged_core.sampling", "paged_core.execution", "paged_core.scheduling", "torch", "numpy"} | EVERYBODYS,
        set(),
    ),
    "paged_core/text": (
        {"paged_core.text", "paged_core.sampling", "paged_core.scheduling", "paged_core.errors", "torch"}
        | EVERYBODYS
        | {"paged_core.engine.engine"},  # for its type only
        set(),
    ),
    "paged_core/engine": (CORE, {"paged_core.builtin", "paged_core.frontends", "paged_core.text", "paged_core.cli"}),
    "paged_core/builtin": (
        {"paged_core.execution", "paged_core.sampling", "paged_core.scheduling", "paged_core.hookspecs"}
        | {
            "paged_core.config",
            "paged_core.errors",
            "paged_core.tiers",
            "paged_core.builtin",
            "paged_kernels",
            "torch",
        },
        set(),
    ),
    "paged_core/ranks": (
        {"paged_core.ranks", "paged_core.execution", "paged_core.scheduling", "paged_core.errors", "torch"},
        set(),
    ),
    "paged_core/tiers": ({"paged_core.tiers", "paged_core.scheduling", "paged_core.errors", "torch"}, set()),
    "paged_core": (CORE, {"paged_core.builtin"}),
    "adapters/serving/paged_serving": (
        {"paged_serving", "paged_core", "torch", "llguidance", "prometheus_client", "msgspec", "regex", "zmq"},
        set(),
    ),
}

# Third parties that the core uses where they are installed, and does without where they aren't.
OPTIONAL = {"paged_core/frontends/llm.py": {"tqdm"}}


def room_of(path: Path) -> str | None:
    inside = path.relative_to(ROOT).as_posix()
    return next((room for room in ROOMS if inside.startswith(room + "/")), None)


def complaints(path: Path, source: str) -> list[str]:
    """What a file of the core, the kernels or the servers' common room imports and may not."""
    room = room_of(path)
    assert room is not None
    allowed, forbidden = ROOMS[room]
    file = path.relative_to(ROOT).as_posix()
    package = ".".join(path.parent.relative_to(ROOT).parts)
    return [
        f"{file}:{line} imports {module}"
        for module, _, line in imports_of(source, package)
        if module.split(".")[0] not in STDLIB
        and (not within(module, allowed | OPTIONAL.get(file, set())) or within(module, forbidden))
    ]


def test_the_core_and_the_kernels_import_only_what_the_table_allows():
    files = [source for room in ("paged_core", "kernels", "adapters/serving") for source in sources(ROOT / room)]
    assert len(files) > 20
    assert [complaint for path in files for complaint in complaints(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("paged_core/scheduling/new.py", "def f():\n    import torch"),
        ("paged_core/scheduling/new.py", "from paged_core.config import EngineConfig"),
        ("paged_core/scheduling/new.py", "from ..execution import model"),
        (
            "paged_core/execution/new.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from paged_core import engine",
        ),
        ("paged_core/execution/new.py", "from paged_kernels import reference"),
        ("paged_core/builtin/new.py", "from paged_core.engine.engine import Engine"),
        ("adapters/serving/paged_serving/protocol/new.py", "import starlette"),
        ("paged_core/text/new.py", "from paged_core.frontends.llm import LLM"),
        ("paged_core/engine/new.py", "from paged_core.text.codec import TextCodec"),
        ("paged_core/sampling/new.py", "from paged_core.engine.engine import Engine"),
        ("paged_core/new.py", "from paged_core.builtin import sampler"),
        ("paged_core/new.py", "from paged_core import builtin"),
        ("paged_core/new.py", "import importlib\nimportlib.import_module('paged_core.builtin.sampler')"),
        ("paged_core/new.py", "import transformers"),
        ("kernels/paged_kernels/new.py", "import paged_core"),
    ],
)
def test_a_forbidden_import_would_be_found(file, source):
    assert len(complaints(ROOT / file, source)) == 1


SHARED = {"paged_core": paged_core.__all__, "paged_serving": paged_serving.__all__}  # whose public names are for all
STANDS_ON = {"paged_ray": {"paged_openai": paged_openai.__all__}}  # an adapter over another's public names


def adapters() -> dict[str, list[Path]]:
    """import name -> files"""
    packages = [path for path in (ROOT / "adapters").glob("*/*") if (path / "__init__.py").is_file()]
    return {package.name: sources(package) for package in packages}


def adapter_complaints(own: str, others: set[str], file: str, source: str) -> list[str]:
    found = []
    for module, name, line in imports_of(source, own):
        top = module.split(".")[0]
        shared = (SHARED | STANDS_ON.get(own, {})).get(top) if top != own else None
        inside = shared is not None and (module != top or name not in shared)
        if inside or top == "paged_kernels" or (shared is None and top in others):
            found.append(f"{file}:{line} imports {module}{'.' + name if name else ''}")
    return found


def test_adapters_import_public_names_of_the_core_and_neither_kernels_nor_each_other():
    found = []
    packages = adapters()
    assert "paged_hf" in packages
    for own, files in packages.items():
        for path in files:
            file = path.relative_to(ROOT).as_posix()
            found += adapter_complaints(own, packages.keys() - {own}, file, path.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from paged_core.engine.engine import Engine",
        "from paged_core import engine",
        "from paged_core import load_plugins",
        "import paged_core.engine.engine",
        "import paged_core",
        "from paged_serving.protocol.call import Call",
        "from paged_serving import protocol",
        "def f():\n    from paged_kernels import reference",
        "from paged_other import anything",
    ],
)
def test_an_adapters_forbidden_import_would_be_found(source):
    assert len(adapter_complaints("paged_new", {"paged_other"}, "new.py", source)) == 1

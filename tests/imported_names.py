"""Lists the imports of a Python file, inside functions too."""

from __future__ import annotations

import ast
from typing import NamedTuple

from places import ROOT


class Import(NamedTuple):
    module: str  # "paged_core.engine.engine", also for "from paged_core import engine"
    name: str | None  # the imported name; None for "import module"
    line: int


def imports_of(source: str, package: str = "") -> list[Import]:
    """Every import in a file: at its top, inside functions, and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: one dot is the file's own package
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*parents, module] if module else parents)
            found += [_submodule_or_name(module, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                found.append(Import(str(node.args[0].value), None, node.lineno))
    return found


def _submodule_or_name(module: str, name: str, line: int) -> Import:
    if module.split(".")[0] == "paged_core":
        inside = ROOT / module.replace(".", "/") / name
        if inside.is_dir() or inside.with_suffix(".py").is_file():
            return Import(f"{module}.{name}", None, line)
    return Import(module, name, line)

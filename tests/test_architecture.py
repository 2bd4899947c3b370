"""The rules of docs/architecture.md, held: where packages stand, what is public, what is loaded, what is listed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import paged_core
from imported_names import imports_of
from paged_core import hookspecs
from places import ROOT, sources

SHELVES = ("kernels", "adapters")
STDLIB = frozenset(sys.stdlib_module_names)


# ---- shelves ---------------------------------------------------------------------------------------------------


def test_shelves_are_folders_and_no_packages():
    shelves = [ROOT / shelf for shelf in SHELVES]
    shelves += [path for path in (ROOT / "adapters").iterdir() if path.is_dir() and path.name != "__pycache__"]
    shelves += [ROOT / "tests" / shelf for shelf in SHELVES]
    assert [str(path) for path in shelves if (path / "__init__.py").exists()] == []


def new_python(code: str, cwd: Path, *path: Path) -> str:
    """What a fresh interpreter prints; ``cwd`` and ``path`` stand first on its sys.path."""
    first = f"import sys; sys.path[:0] = {[str(cwd), *map(str, path)]!r}\n"
    done = subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_installing_us_takes_nobodys_name_away(tmp_path):
    code = "from importlib.util import find_spec\nprint([find_spec(n) and find_spec(n).origin for n in {names!r}])"
    found = ast.literal_eval(new_python(code.format(names=SHELVES), tmp_path))
    assert [origin for origin in found if origin and Path(origin).is_relative_to(ROOT)] == []


def test_a_foreign_package_called_kernels_is_found_even_from_our_root(tmp_path):
    for shelf in SHELVES:
        (tmp_path / shelf).mkdir()
        (tmp_path / shelf / "__init__.py").write_text("foreign = True")
    print_both = "import adapters, kernels; print(adapters.foreign, kernels.foreign)"
    assert new_python(print_both, ROOT, tmp_path) == "True True"


# ---- what is public --------------------------------------------------------------------------------------------


def names_in_init() -> set[str]:
    """Everything that paged_core/__init__.py imports from the core, lazily or not."""
    found = imports_of((ROOT / "paged_core/__init__.py").read_text(encoding="utf-8"), "paged_core")
    return {name for module, name, _ in found if module.startswith("paged_core.") and name}


def test_all_is_sorted_and_every_name_in_it_resolves():
    constants_classes_others = [
        sorted(name for name in paged_core.__all__ if kind(name))
        for kind in (
            str.isupper,
            lambda name: name[0].isupper() and not name.isupper(),
            lambda name: not name[0].isupper(),
        )
    ]
    assert paged_core.__all__ == [name for names in constants_classes_others for name in names]
    assert all(getattr(paged_core, name) is not None for name in paged_core.__all__)
    assert set(paged_core.__all__) <= set(dir(paged_core))


def test_all_names_everything_that_the_package_imports_for_others():
    assert names_in_init() | {"__version__"} == set(paged_core.__all__)
    assert names_in_init() >= paged_core._LAZY.keys()


def test_every_exception_of_ours_is_public():
    from paged_core import errors

    assert set(errors.__all__) <= set(paged_core.__all__)


def test_every_type_that_a_hook_names_is_public():
    """A plugin's author writes them; without a public name for each there would be no contract to keep."""
    specs = imports_of((ROOT / "paged_core/hookspecs.py").read_text(encoding="utf-8"), "paged_core")
    named = {name for module, name, _ in specs if module.startswith("paged_core.") and name}
    assert named - set(paged_core.__all__) == set()


# ---- what is loaded --------------------------------------------------------------------------------------------


def test_importing_the_core_loads_no_heavy_package(tmp_path):
    heavy = {"torch", "transformers", "triton", "numba", "numpy", "prometheus_client", "starlette"}
    assert new_python(f"import paged_core; print({heavy} & sys.modules.keys())", tmp_path) == "set()"


def test_loading_the_plugins_loads_no_framework_and_no_kernel_compiler(tmp_path):
    heavy = {"transformers", "triton", "numba"}
    load = "from paged_core.plugins import load_plugins; load_plugins()"
    assert new_python(f"{load}; print({heavy} & sys.modules.keys())", tmp_path) == "set()"


HIDE = """
class Hiding:  # as if these were not installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("transformers", "numba", "llvmlite", "triton", "tqdm")
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

ANSWER = """
from tiny_model import TinyModel
from paged_core import Engine, EngineConfig, PluginError, SamplingParams

model = TinyModel()
engine = Engine(model, EngineConfig(num_blocks=32, block_size=4, attention_backend="auto"))
engine.add_request("r", [1, 2, 3, 4, 5], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
tokens = []
while engine.has_work:
    tokens += [token for output in engine.step() for token in output.token_ids]
assert tokens == model.generate([1, 2, 3, 4, 5], 5), tokens
try:
    Engine("some/model")
except PluginError as error:
    print(error)
print([m for m in ("transformers", "numba", "triton", "tqdm") if m in sys.modules])
"""


def test_an_engine_runs_where_only_torch_is_installed(tmp_path):
    told, loaded = new_python(HIDE + ANSWER, tmp_path, ROOT / "tests").splitlines()
    assert "pip install 'paged-core[hf]'" in told
    assert loaded == "[]"


# ---- what is written down --------------------------------------------------------------------------------------


def hooks() -> set[str]:
    return {name for name, function in vars(hookspecs).items() if hasattr(function, "paged_core_spec")}


def hooks_in(source: str) -> set[str]:
    """Hooks that a Python source implements."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            marks = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
            if any(isinstance(mark, ast.Name) and mark.id == "hookimpl" for mark in marks):
                found.add(node.name)
    return found


def test_every_hook_has_an_example_in_the_docs():
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/plugins.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(hooks()) >= 12
    assert hooks() - set().union(*map(hooks_in, blocks)) == set()


def test_every_file_has_its_line_in_the_docs_and_every_line_its_file():
    folders = ["paged_core", "kernels", "adapters", "benchmarks"]
    files = [path.relative_to(ROOT).as_posix() for folder in folders for path in sources(ROOT / folder)]
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = [
        folder + file
        for folder, lines in re.findall(r"^### `([^`]+/)`.*\n((?:(?!###).*\n)*)", text, re.MULTILINE)
        for file in re.findall(r"^- `([^`]+\.py)`: \S", lines, re.MULTILINE)
    ]
    assert sorted(listed) == sorted(set(listed)), "a file has two lines"
    untold = {file for file in files if file.endswith("/__init__.py") and _is_only_a_docstring(ROOT / file)}
    assert sorted(set(files) - untold - set(listed)) == []
    assert sorted(set(listed) - set(files)) == []


def _is_only_a_docstring(path: Path) -> bool:
    code = ast.parse(path.read_text(encoding="utf-8")).body
    return len(code) == 1 and ast.get_docstring(ast.Module(code, [])) is not None


def test_tests_hardly_reach_into_private_parts():
    """What a user or an observer could notice is public. What must be broken or held still may be private."""

    def private(folder: str):
        for path in sources(ROOT / folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                    yield node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "Episode")

    ours = {name for folder in ("paged_core", "kernels", "adapters") for name, by_self in private(folder) if by_self}
    of_others = {"_replace", "_parameters", "_modules", "_buffers"}  # of tuples and of torch's modules
    reaches = [name for name, by_self in private("tests") if not by_self and name in ours - of_others]
    assert 0 < len(reaches) <= 90, Counter(reaches)

"""Plugins that come with a distribution of their own: installed, they are found; without it their names are unknown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from paged_core import PluginError, UnsupportedModel
from plugged_engine import answer_all, engine_of, truth

EXAMPLE = Path(__file__).parent.parent / "example_plugin"


@pytest.fixture(scope="module")
def installed_example(tmp_path_factory) -> Path:
    """Where pip has put the example plugin: a folder outside this project."""
    folder = tmp_path_factory.mktemp("example")
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)  # building leaves its traces beside the sources
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, *offline, "--target", str(site), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


def in_new_process(function: str, site: Path) -> dict:
    """What a function of this file returns when ``site`` is one of the installed places."""
    tests = Path(__file__).parent.parent
    code = f"import json, test_installed_plugins as here; print(json.dumps(here.{function}()))"
    path = os.pathsep.join([str(site), str(tests), str(tests / "core")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def answer_with_and_without_the_example() -> dict:
    plain = answer_all(engine_of(max_num_seqs=1))
    engine = engine_of(max_num_seqs=1, scheduling_policy="shortest", attention_backend="gather")
    changed = answer_all(engine)
    import paged_example

    from paged_core.engine import engine as core

    return {
        "plain": plain,
        "changed": changed,
        "backend": engine._runner.backend.run.__module__,
        "policy": type(engine._scheduler.policy).__module__,
        "plugin": paged_example.__file__,
        "core": core.__file__,
    }


def test_an_installed_distribution_replaces_the_policy_and_the_attention_backend(installed_example):
    seen = in_new_process("answer_with_and_without_the_example", installed_example)
    assert seen["backend"] == seen["policy"] == "paged_example"
    assert Path(seen["plugin"]).parent == installed_example
    assert installed_example not in Path(seen["core"]).parents
    assert seen["plain"][0] == ["long", "short", "middle"]
    assert seen["changed"][0] == ["short", "middle", "long"]
    assert seen["plain"][1] == seen["changed"][1] == truth()


def test_without_the_distribution_its_names_are_unknown():
    with pytest.raises(UnsupportedModel, match="'gather'"):
        engine_of(attention_backend="gather")


def fake_entry_point(monkeypatch, load) -> None:
    """As if a distribution called "stranger" were installed whose only entry point does ``load()``."""
    entry = SimpleNamespace(name="broken", load=load, dist=SimpleNamespace(name="stranger"))
    monkeypatch.setattr("paged_core.plugins.entry_points", lambda group: [entry])


def test_an_installed_plugin_that_cannot_be_imported_is_a_plugin_error_with_its_cause(monkeypatch):
    def load():
        raise ImportError("No module named 'flash'")

    fake_entry_point(monkeypatch, load)
    with pytest.raises(PluginError, match=r"'broken' of stranger.*No module named 'flash'") as caught:
        engine_of()
    assert isinstance(caught.value.__cause__, ImportError)

"""Every file of examples/ runs, as its page says, and shows what it is there to show."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny_folder
from places import ROOT

EXAMPLES = ROOT / "examples"


def run(capsys, monkeypatch, name: str, *arguments: str) -> str:
    """What the example prints, run in this process: transformers is imported once for all."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_page_lists_every_example():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\((\w+\.py)\)", page)) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_says_what_the_example_is(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_the_script_gives_stocks_tokens_in_all_three_ways(capsys, monkeypatch):
    told = run(capsys, monkeypatch, "script.py", "--max-new-tokens", "6", "The sky is", "One two three")
    assert told.count("same tokens; native") == 3, told


def test_the_pipeline_runs_natively(capsys, monkeypatch):
    told = run(capsys, monkeypatch, "chat_pipeline.py", "--max-new-tokens", "6", "Name a colour.", "Name a fruit.")
    assert re.search(r"Name a fruit\. -> \w", told)
    assert told.rstrip().splitlines()[-1].startswith("native")


def test_the_server_answers_users_at_once_and_outlives_bad_bodies(tmp_path):
    make_server = runpy.run_path(str(EXAMPLES / "threaded_server.py"))["make_server"]
    server = make_server(str(tiny_folder.save(tmp_path)), port=0, max_new_tokens=6)
    url = f"http://127.0.0.1:{server.server_port}"

    def ask(prompt: str) -> str:
        with urllib.request.urlopen(url, data=prompt.encode(), timeout=300) as answer:
            return answer.read().decode()

    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask("")
        assert refused.value.code == 400
        with ThreadPoolExecutor(4) as users:
            texts = list(users.map(ask, ["Once upon a time", "The sky is", "Once upon a time", "Water is"]))
        assert all(texts)
        assert texts[0] == texts[2] != texts[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_rollout_loop_learns_on_the_weights_that_it_samples_from(capsys, monkeypatch, tmp_path):
    options = ("--model", str(tiny_folder.save(tmp_path)), "--steps", "2", "--group", "4", "--max-new-tokens", "6")
    told = run(capsys, monkeypatch, "rollout_loop.py", *options)
    assert len(re.findall(r"^step \d: reward \d\.\d+, loss -?\d+\.\d+; native", told, re.MULTILINE)) == 2, told


def test_the_plugins_policy_lets_the_short_prompts_go_first(capsys, monkeypatch):
    told = run(capsys, monkeypatch, "plugin.py", "--max-tokens", "3")
    assert "ended in this order: question 1, question 2, question 0" in told
    assert "running #.." in told


def test_examples_import_only_what_their_page_asks_to_install():
    found = set()
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    assert found - sys.stdlib_module_names == {"paged_core", "paged_hf", "torch", "transformers"}

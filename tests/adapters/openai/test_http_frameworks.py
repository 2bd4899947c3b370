"""Frameworks that people call servers through, asked for what ``make clients`` asks them for: each in a process of its
own, against a server whose model says what it must and else one thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hermes_model import SayingModel, hermes_tokenizer
from http_server import Running, alphabet_server
from places import ROOT


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model = SayingModel()
    model.say("Sunny, I think.")
    with alphabet_server(model, tokenizer=hermes_tokenizer(), reasoning=False) as running:
        yield running


@pytest.mark.parametrize(("script", "num_trials"), [("try_langchain.py", 6), ("try_pydantic_ai.py", 3)])
def test_frameworks_get_what_they_ask_for(server: Running, script: str, num_trials: int) -> None:
    command = [sys.executable, str(ROOT / "scripts/clients" / script), server.url, "alphabet"]
    env = {**os.environ, "LANGSMITH_TRACING": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    trials = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tried":')]
    assert done.returncode == 0, done.stderr
    assert len(trials) == num_trials
    assert [trial for trial in trials if trial["wrong"] is not None] == [], done.stderr
    server.come_to_rest()

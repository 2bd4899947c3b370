"""What a process does to itself while a patched model generates: interrupts, forks and exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = (
    "interrupt_a_free_call",
    "interrupt_a_lockstep_call",
    "fork_before_between_and_during_calls",
    "multiprocessing_by_fork",
    "fork_in_a_callers_own_processor",
    "fork_in_a_callers_own_streamer",
    "exit_while_daemon_threads_call",
    "exit_handlers_may_call_and_wait_for_callers",
)


@pytest.fixture(scope="module")
def scenarios() -> Any:
    """Exit status, output and errors of each scenario, run in a process of its own."""
    script = Path(__file__).with_name("generate_scenarios.py")
    command = [sys.executable, "-W", "ignore", script, *SCENARIOS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_a_process_of_its_own(scenarios: Any, name: str) -> None:
    status, output, errors = scenarios[name]
    assert (status, errors, output) == (0, "", "well\n")

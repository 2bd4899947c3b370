"""Only the thread that steps has helper threads: with more helpers than cores, each operation would wait for one."""

from __future__ import annotations

import os
import subprocess
import sys

from places import TESTS

HELPERS = """
import os, time
import torch
from paged_core import AsyncEngine, EngineConfig, SamplingParams, release_helper_threads

def num_threads():
    return len(os.listdir("/proc/self/task"))

def comes_to(number):
    # threads that have ended are listed for a moment more
    deadline = time.monotonic() + 30
    while num_threads() != number and time.monotonic() < deadline:
        time.sleep(0.01)
    return num_threads() == number

def compute():
    torch.ones(2000, 1000).sum()

torch.set_num_threads(3)
alone = num_threads()
compute()
assert num_threads() == alone + 2, "this thread has helpers"
"""


def run(program: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", HELPERS + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_gives_back_its_helpers_gets_new_ones_when_it_computes_again():
    run("""
release_helper_threads()
assert comes_to(alone)
compute()
assert num_threads() == alone + 2
release_helper_threads()
release_helper_threads()
assert comes_to(alone)
""")


def test_the_thread_that_has_made_an_async_engine_keeps_no_helpers():
    run("""
from alphabet_model import AlphabetModel
from toy_tokenizers import CharacterTokenizer
config = EngineConfig(num_blocks=16, attention_backend="reference")
with AsyncEngine(AlphabetModel(), tokenizer=CharacterTokenizer(), config=config) as engine:
    assert comes_to(alone)
    assert engine.submit("abc", SamplingParams(temperature=0, max_tokens=3)).result().finished
""")


def test_the_child_of_a_fork_waits_for_no_helpers():
    run("""
child = os.fork()
if not child:
    release_helper_threads()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""")

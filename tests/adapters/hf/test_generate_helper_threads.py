"""A caller of the patched generate waits while the engine's thread computes: it keeps no helper threads meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys

import tiny_folder

PROGRAM = """
import os, sys, time
import torch
from paged_hf import paged_generate
from transformers import AutoModelForCausalLM

def num_threads():
    return len(os.listdir("/proc/self/task"))

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.generate = paged_generate(model)
prompt = torch.tensor([[1, 2, 3]])
model.generate(prompt, max_new_tokens=2, do_sample=False)  # what is started once has been started
torch.set_num_threads(3)
time.sleep(1)
alone = num_threads()
torch.ones(2000, 1000).sum()
assert num_threads() == alone + 2, "this thread has helpers"
model.generate(prompt, max_new_tokens=4, do_sample=False)
assert model.generate.last_report().tier == "native"
deadline = time.monotonic() + 30
while num_threads() != alone and time.monotonic() < deadline:
    time.sleep(0.01)  # threads that have ended are listed for a moment more
assert num_threads() == alone
"""


def test_a_caller_gives_back_the_helper_threads_of_what_it_computed_before(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tiny_folder.save(tmp_path / "model"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

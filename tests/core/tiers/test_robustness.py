"""A sample of scripts/tier_robustness.py: a process that writes is killed, and files are damaged."""

from __future__ import annotations

import json
import subprocess
import sys

from places import ROOT


def test_kills_and_damage_bring_no_wrong_block_and_no_error():
    arguments = [sys.executable, str(ROOT / "scripts" / "tier_robustness.py"), "--kills", "8", "--damages", "60"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, damages = (json.loads(line.split(": no wrong block")[0]) for line in done.stdout.splitlines())
    assert kills["kills"] == 8 and damages["damages"] >= 60
    assert kills["blocks_back"] > 0
    assert damages["blocks_found_damaged"] > 0

"""A sample of scripts/tier_robustness.py: a process that writes is killed, and files are damaged."""

from __future__ import annotations

import subprocess
import sys

from places import ROOT


def test_kills_and_damage_bring_no_wrong_block_and_no_error():
    arguments = [sys.executable, str(ROOT / "scripts" / "tier_robustness.py"), "--kills", "3", "--damages", "60"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 kills: blocks back" in done.stdout
    assert "60 damages: blocks back" in done.stdout

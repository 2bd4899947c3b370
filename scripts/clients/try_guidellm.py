"""guidellm: its command, for a short benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trial import MODEL, run


def benchmark(url: str) -> None:
    command = [
        str(Path(sys.executable).parent / "guidellm"), "benchmark", "run", "--target", url, "--model", MODEL,
        "--profile", "synchronous", "--max-requests", "3", "--data", "prompt_tokens=16,output_tokens=8",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-300:]


if __name__ == "__main__":
    run({"a benchmark": benchmark})

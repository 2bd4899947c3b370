"""guidellm: its command, for short benchmarks of both routes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from trial import MODEL, run

PROMPTS = [{"prompt": f"Count to {number}.", "output_tokens_count": 8} for number in range(2, 8)]


def benchmark(url: str, request_format: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts, report = Path(folder) / "prompts.json", Path(folder) / "report.json"
        prompts.write_text(json.dumps(PROMPTS))
        command = [
            str(Path(sys.executable).parent / "guidellm"), "run",
            "--backend", f"kind=openai_http,target={url},model={MODEL},request_format={request_format}",
            "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=3",
            "--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={report}", "--disable-console",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stderr[-300:]
        (told,) = json.loads(report.read_text())["benchmarks"]
    requests = told["requests"]
    assert (len(requests["successful"]), requests["errored"]) == (3, []), requests
    assert all(each["output_tokens"] == 8 for each in requests["successful"]), requests


if __name__ == "__main__":
    run({
        "a benchmark of chats": lambda url: benchmark(url, "/v1/chat/completions"),
        "of completions": lambda url: benchmark(url, "/v1/completions"),
    })  # fmt: skip

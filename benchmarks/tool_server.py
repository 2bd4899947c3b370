"""A ``paged serve`` of SmolLM2-135M-Instruct with a chat template for tools, which the model's own lacks. Calls are
written as by Hermes' models.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paged_hf import embedded_folder

CHAT = """{%- if tools %}<|im_start|>system
You may call these functions:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
For each call, write a JSON object with its name and arguments:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_START_LIMIT_S = 300


@contextmanager
def serving(port: int) -> Iterator[str]:
    """The URL of such a server, which runs until the end of the block.

    Raises:
        SystemExit: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        for path in embedded_folder().iterdir():
            if path.name != "chat_template.jinja":
                (model / path.name).symlink_to(path)
        (model / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
        command = [sys.executable, "-m", "paged_openai", "--model", folder, "--served-model-name", "smollm2",
                   "--port", str(port), "--max-model-len", "8192", "--log-level", "error"]  # fmt: skip
        process = subprocess.Popen(command)
        try:
            _wait(f"http://127.0.0.1:{port}/ready", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")

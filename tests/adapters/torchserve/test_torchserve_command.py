"""`paged torchserve serve` and the server that it starts: answers, its end, and models that do not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

import tiny_folder
from paged_core import ConfigError
from paged_core.cli import main
from paged_torchserve.server import ServerError, ServerOptions, TorchServe
from torchserve_server import (
    ENGINE,
    READY_S,
    free_addresses,
    stock_generate,
)
from waiting import until


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_generate()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """One whose path leaves room for the sockets of TorchServe's workers."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder)


def test_the_command_serves_an_archives_folder_asks_for_tokens_and_leaves_nothing_behind(tmp_path, short_folder, stock):
    archive = tmp_path / "packed.mar"
    assert main(["torchserve", "archive", str(tiny_folder.save(tmp_path / "model")), str(archive), "--name", "tiny",
                 *ENGINE]) == 0  # fmt: skip
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    at = free_addresses()
    command = [sys.executable, "-m", "paged_core", "torchserve", "serve", tmp_path / "unpacked", "--token-auth",
               "--port", str(at.inference), "--management-port", str(at.management), "--metrics-port", str(at.metrics),
               "--grpc-port", str(at.grpc)]  # fmt: skip
    temp = short_folder
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temp)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            url = at.url(at.inference) + "/predictions/tiny"
            assert lines[1] == f"ready: {url}\n"
            key = json.loads(Path(lines[2].removeprefix("keys: ").strip()).read_text())["inference"]["key"]
            body = {"prompt": "Hello", "max_new_tokens": 9}
            assert httpx2.post(url, json=body, trust_env=False).status_code == 400
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx2.post(url, json=body, headers=headers, trust_env=False).text == stock("Hello", 9)
            late = {"prompt": "Hello", "max_new_tokens": 300, "stream": True}
            with httpx2.stream("POST", url, json=late, headers=headers, timeout=60, trust_env=False) as response:
                pieces = response.iter_bytes()
                said = next(pieces)
                process.terminate()  # answers under way are finished
                assert (said + b"".join(pieces)).decode() == stock("Hello", 300)
        finally:
            process.terminate()  # the second time at once
        assert process.wait(60) == 0
    assert list(temp.glob("paged-torchserve-*")) == []
    temporary = str(temp)
    until(
        lambda: not any(temporary in " ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"]))
    )


def test_a_model_that_does_not_load_is_told_with_the_log(tmp_path):
    archive = tmp_path / "none.mar"
    missing = tmp_path / "nothing-here"
    assert main(["torchserve", "archive", "no/model", str(archive), "--set", f"model={missing}"]) == 0
    server = TorchServe([archive], tmp_path / "work", ServerOptions(free_addresses()))
    with server, pytest.raises(ServerError, match=r"torchserve\.log:\n.*ConfigError: .*nothing-here") as raised:
        server.wait_until_ready(READY_S)  # it is told as soon as it is known
    assert "nvidia" not in str(raised.value)


def test_a_working_folder_with_too_long_a_path_is_refused(tmp_path):
    archive = tmp_path / "none.mar"
    assert main(["torchserve", "archive", "no/model", str(archive)]) == 0
    with pytest.raises(ConfigError, match="too long"):
        TorchServe([archive], tmp_path / ("long" * 25))

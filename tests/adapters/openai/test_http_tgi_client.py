"""TGI's own client, text-generation 0.7.0. It needs huggingface_hub below 1, so it lives in a folder of its own.

pip fetches it once, into pytest's cache; the rest of its needs is in the environment that the tests run in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from http_server import alphabet_server
from paged_openai.app import AppOptions
from places import TESTS

CALLS = TESTS / "tgi_calls.py"
PACKAGES = ("text-generation==0.7.0", "huggingface-hub==0.36.2", "aiohttp", "aiohappyeyeballs", "aiosignal",
            "async-timeout", "attrs", "frozenlist", "multidict", "propcache", "yarl")  # fmt: skip


@pytest.fixture(scope="module")
def site(pytestconfig: pytest.Config) -> Path:
    """The folder that the client stands in."""
    assert pytestconfig.cache is not None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = pytestconfig.cache.mkdir("text-generation-0.7.0") / f"python{version}"
    if not site.exists():
        fresh = site.with_name(f"{site.name}-{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(fresh), *PACKAGES], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with suppress(OSError):  # another run of the tests was faster
            fresh.rename(site)
    return site


@pytest.fixture(scope="module")
def found(site: Path) -> dict[str, Any]:
    """What each call of tgi_calls.py came to."""
    quirk = AppOptions(tgi_chat_stream=True)
    with alphabet_server() as server, alphabet_server(options=quirk) as quirky:
        done = subprocess.run(
            [sys.executable, str(CALLS), server.url, quirky.url],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(site), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        )
        assert done.returncode == 0, done.stderr
        server.come_to_rest()
        quirky.come_to_rest()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_it_generates_with_all_details(found: dict[str, Any]) -> None:
    assert found["plain"] == {
        "text": "BCDEF", "reason": "length", "num_tokens": 5, "tokens": list("BCDEF"), "prefill": ["A"], "top": [2] * 5,
    }  # fmt: skip
    assert found["options"] == ["ABCD", "stop_sequence", 3]


def test_best_of_brings_the_others_along(found: dict[str, Any]) -> None:
    assert found["best_of"] == ["BCD", ["BCD"]]


def test_it_streams_tokens_and_the_whole_text_with_the_last(found: dict[str, Any]) -> None:
    assert found["streamed"] == [["B", "C", "D", "E"], "BCDE", 4, [None, None, None]]


def test_its_async_client_does_as_well(found: dict[str, Any]) -> None:
    assert found["asynchronous"] == ["BCD", "NOP", "bcd", ["B", "C", "D"]]


def test_what_is_refused_is_a_validation_error_that_says_why(found: dict[str, Any]) -> None:
    long, empty, typical = found["refused"]
    assert "300 tokens" in long
    assert "empty" in empty
    assert "typical_p" in typical


def test_it_chats_and_streams_chats_where_the_switch_is_on(found: dict[str, Any]) -> None:
    assert found["chat"] == [";<=>", 4]
    assert found["chat_stream"] == ";<=>"

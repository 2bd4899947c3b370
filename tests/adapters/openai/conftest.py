"""Servers of the alphabet's model: one with default options, and one with keys and limits."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from http_server import Running, alphabet_server
from paged_openai.app import AppOptions
from paged_serving import RequestLimits


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with alphabet_server() as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    options = AppOptions(api_keys=("first", "second"), cors_origins=("https://page.example",), max_body_bytes=2000,
                         tgi_chat_stream=True)  # fmt: skip
    limits = RequestLimits(max_prompt_tokens=20, max_tokens=50, max_n=2)
    with alphabet_server(options=options, limits=limits) as server:
        yield server


@pytest.fixture
def friend(guarded: Running) -> Iterator[httpx2.Client]:
    with guarded.client(headers={"Authorization": "Bearer second"}) as client:
        yield client

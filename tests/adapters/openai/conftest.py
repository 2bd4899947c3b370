"""A server of the alphabet's model, as it is when nothing is asked of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from http_server import Running, alphabet_server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with alphabet_server() as running:
        yield running

"""A small patched model, and the check that no thread is left when a test ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from concurrent_calls import SMALL
from paged_hf import paged_generate


@pytest.fixture
def model(tiny: Any) -> Any:
    model = tiny("llama", **SMALL)
    model.generate = paged_generate(model, check=False)
    return model


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before

"""Tests of a patched model that is copied, saved, trained, wrapped, changed or dropped: the next call must answer as
stock would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paged_hf import paged_generate
from patched_calls import SMALL


@pytest.fixture
def make(tiny: Any) -> Callable[..., Any]:
    def make(kind: str = "llama", **own: Any) -> Any:
        return tiny(kind, **{**SMALL, **own})

    return make


@pytest.fixture
def model(make: Any) -> Any:
    model = make()
    model.generate = paged_generate(model, check=False)
    return model


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert "paged-generate" not in {thread.name for thread in threading.enumerate()}

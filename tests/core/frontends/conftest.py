"""Fixtures that tests of the frontends share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from alphabet_model import AlphabetModel
from async_calls import CONFIG
from paged_core import AsyncEngine
from toy_tokenizers import CharacterTokenizer


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Give SIGINT Python's handler, because a process that a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model() -> AlphabetModel:
    return AlphabetModel()


@pytest.fixture
def engine(model: AlphabetModel) -> Iterator[AsyncEngine]:
    with AsyncEngine(model, tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        yield engine

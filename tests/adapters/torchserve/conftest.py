"""Workers of a test, closed when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from torchserve_worker import Worker


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    made: list[Worker] = []

    def make(model: AlphabetModel | None = None, **settings: Any) -> Worker:
        made.append(Worker(monkeypatch, tmp_path, model, **settings))
        return made[-1]

    yield make
    for each in made:
        each.handler.close()

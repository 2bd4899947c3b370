"""Workers that are closed when their test ends; a model's folder, and archives of it by TorchServe's own archiver."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from paged_serving.grammars.trials import Trials
from torchserve_archives import STOCK_CONFIG, WEIGHTS
from torchserve_worker import Worker


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    made: list[Worker] = []
    monkeypatch.setattr(Trials, "start", lambda trials: None)  # a process each that hardly a test asks anything

    def make(model: AlphabetModel | None = None, **settings: Any) -> Worker:
        made.append(Worker(monkeypatch, tmp_path, model, **settings))
        return made[-1]

    yield make
    for each in made:
        each.handler.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a model's files, as an archiver sees them."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def stock(tmp_path: Path) -> Any:
    """Return ``make``: ``stock(files, config)`` makes an archive with torch-model-archiver, or its folder."""

    def make(extra_files: Path, config: str = STOCK_CONFIG, archive_format: str = "default") -> Path:
        handler, settings = tmp_path / "their_handler.py", tmp_path / "their-config.yaml"
        handler.write_text("class Theirs:\n    pass\n")
        settings.write_text(config)
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "old", "--version", "2.1",
                   "--handler", handler, "--extra-files", extra_files, "--config-file", settings,
                   "--export-path", tmp_path, "--archive-format", archive_format]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        return tmp_path / {"default": "old.mar", "no-archive": "old", "tgz": "old.tar.gz"}[archive_format]

    return make

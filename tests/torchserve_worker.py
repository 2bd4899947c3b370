"""A worker without TorchServe: our handler is called as TorchServe's worker calls it, with its own context."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import paged_torchserve.handler
from alphabet_model import AlphabetModel
from paged_core import AsyncEngine, Engine
from paged_torchserve import metrics
from toy_tokenizers import CharacterTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # its module leaves a file open
    from ts.context import Context, RequestProcessor
    from ts.metrics.caching_metric import CachingMetric


class FakeCache:
    """TorchServe's cache of metrics, which records what it is given."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}
        self.num_updates = 0

    def add_metric_to_cache(self, metric_name: str, **kind: Any) -> Any:
        def add_or_update(value: float, labels: list[str]) -> None:
            assert labels == ["m", "Model"]
            self.num_updates += 1
            adds = metrics.NAMES[metric_name] == "counter"
            self.told[metric_name] = value + (self.told.get(metric_name, 0.0) if adds else 0.0)

        CachingMetric(metric_name=metric_name, **kind)  # it checks its arguments
        return SimpleNamespace(add_or_update=add_or_update)


class Worker:
    """A worker's side of TorchServe: requests come, each step is one call, and ended requests are removed."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp: Path, model: AlphabetModel | None = None, **settings: Any
    ) -> None:
        def open_alphabets(model_dir: Any, devices: Any, found: Any, plugins: Any) -> list[AsyncEngine]:
            engines = [Engine(model or AlphabetModel(), found.engine, plugins=each) for each in plugins]
            return [AsyncEngine(engine, tokenizer=CharacterTokenizer()) for engine in engines]

        monkeypatch.setattr(paged_torchserve.handler, "open_engines", open_alphabets)
        section = {"num_blocks": 128, "attention_backend": "reference", **settings}
        frontend = {name: section.pop(name) for name in ("responseTimeout",) if name in section}
        config = {"continuousBatching": True, **frontend, "paged": section}
        self.cache = FakeCache()
        monkeypatch.setattr("tempfile.tempdir", str(tmp))
        self.context = Context("m", str(tmp / "model"), None, 8, None, "0.12.0", True, self.cache, config)
        self.handler = paged_torchserve.handler.PagedHandler()
        self.handler.initialize(self.context)
        self.engines = [each.engine for each in self.handler._engines]
        self.engine = self.engines[0]
        self.desk, self.watch = self.handler._desk, self.handler._watch
        self.waiting: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
        self.replies: dict[str, Reply] = {}

    def post(self, name: str, parts: dict[str, Any], url_path: str = "", headers: dict[str, str] | None = None) -> None:
        """Send a request to /predictions/NAME, with a version and ``url_path`` if given."""
        self.send(name, parts, {"Host": "here", **(headers or {}), "explain": "False", "url_path": url_path})

    def send(self, name: str, parts: dict[str, Any], headers: dict[str, str]) -> None:
        """Send a request by any of TorchServe's interfaces, which differ by their ``headers``."""
        about_parts = {part: {"content-type": ""} for part in parts}
        self.waiting[name] = (parts, {**about_parts, **headers})
        self.replies[name] = Reply()

    def leave(self, name: str) -> None:
        del self.waiting[name]

    def step(self) -> None:
        names = list(self.waiting)
        self.context.request_ids = dict(enumerate(names))
        self.context.request_processor = [RequestProcessor(self.waiting[name][1]) for name in names]
        answers = self.handler.handle([self.waiting[name][0] for name in names], self.context)
        assert len(answers) == len(names)
        for index in self.context.request_ids:  # requests that the answer doesn't name go on
            name = names[index]
            end = self.context.stopping_criteria[index](answers[index])
            status, _ = self.context.get_response_status(index)
            self.replies[name].add(answers[index], end, status, self.context.get_response_content_type(index))
            if end is False:
                self.waiting[name] = ({}, self.waiting[name][1])
            else:
                del self.waiting[name]

    def tell_metrics(self) -> None:
        """Report metrics, as the handler's watch does from time to time."""
        self.watch._flush()

    def give_up_by(self, way: Callable[[int], object]) -> None:
        """Call ``way`` instead of ending this process."""
        self.watch._give_up = way

    def num_open(self, engine: Engine) -> int:
        """Return the number of the desk's open requests on this engine."""
        return sum(each.lane.engine.engine is engine for each in self.desk._open.values())

    def run(self) -> None:
        deadline = time.monotonic() + 30
        while self.waiting:
            assert time.monotonic() < deadline
            self.step()

    def run_until_told(self, name: str) -> None:
        """Step until something came for this request, which takes more than one step on a busy machine."""
        deadline = time.monotonic() + 30
        while not self.replies[name].messages:
            assert time.monotonic() < deadline
            self.step()

    def ask(self, parts: dict[str, Any], url_path: str = "") -> Reply:
        self.post("r", parts, url_path)
        self.run()
        return self.replies["r"]


class Reply:
    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bool | None]] = []
        self.status, self.content_type = 0, ""

    def add(self, body: bytes, end: bool | None, status: int, content_type: str) -> None:
        assert not self.messages or (self.messages[-1][1] is False and end is not None), "it had ended"
        if not self.messages:
            self.status, self.content_type = status, content_type
        self.messages.append((body, end))

    @property
    def text(self) -> str:
        assert self.messages[-1][1] is not False
        return b"".join(body for body, _ in self.messages).decode()

    @property
    def json(self) -> Any:
        assert self.content_type == "application/json"
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        assert self.content_type.startswith("text/event-stream")
        found = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in found]


REST = "abcdefghijklmnopqrstuvwxyz{|}~\x7f"  # what follows "`" until the end-of-sequence token


def slow(step_s: float, steps: list[Any] | None = None) -> AlphabetModel:
    """Return a model with slow steps. ``steps`` gets the token ids of each."""

    def step(token_ids: list[int]) -> None:
        if steps is not None:
            steps.append(token_ids)
        time.sleep(step_s)

    return AlphabetModel(step)

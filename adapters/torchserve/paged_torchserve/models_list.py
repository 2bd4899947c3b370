"""GET v1/models: OpenAI's list of models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from paged_core import GenerationOutput, Prompt, SamplingParams, StreamDelta
from paged_serving import ServedModel

_STARTED = int(time.time())


class ModelList:
    """A call without a prompt; see paged_serving's Call for its members."""

    def __init__(self, served: ServedModel) -> None:
        self.prompts: list[Prompt] = []
        self.params = SamplingParams()
        self.grammar: Any = None
        self.stream = self.retells = False
        self.named: dict[str, str] = {}
        self._served = served

    def first_chunks(self) -> list[Any]:
        return []

    def chunks(self, number: int, delta: StreamDelta) -> list[Any]:
        return []

    def last_chunks(self, results: Sequence[GenerationOutput]) -> list[Any]:
        return []

    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        told = {"object": "model", "created": _STARTED, "owned_by": "paged-core"}
        limits = {"root": self._served.names[0], "max_model_len": self._served.max_model_len}
        return {"object": "list", "data": [{"id": name, **told, **limits} for name in self._served.names]}

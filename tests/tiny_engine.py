"""An engine over the tiny model, and helpers to run it until nothing is left to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paged_core import Engine, EngineConfig, RequestOutput, SamplingParams
from tiny_model import TinyModel


def tiny_engine(model: Any = None, plugins: Sequence[Any] = (), **config: Any) -> Engine:
    """``config`` replaces sizes with which some dozen requests run without preemption."""
    usual = {"block_size": 4, "num_blocks": 400, "max_num_seqs": 8, "max_num_batched_tokens": 64, "seed": 0}
    settings = EngineConfig(**{"attention_backend": "reference", **usual, **config})
    return Engine(model or TinyModel(), settings, plugins=plugins)


def greedy(num_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, **{"ignore_eos": True, **more})


def run(engine: Engine) -> list[RequestOutput]:
    """Return all outputs. Every invariant is checked after every step, and no block may be in use at the end."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check()
    assert engine.memory.num_blocks_used == 0
    return outputs


def tokens_of(outputs: Iterable[RequestOutput]) -> dict[tuple[str, int], list[int]]:
    """Return the tokens of each row, by (id, index)."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        tokens.setdefault((output.request.id, output.request.index), []).extend(output.token_ids)
    return tokens


def ends_of(outputs: Iterable[RequestOutput]) -> dict[str, tuple[str, str | None]]:
    """Return how each request ended, by its id: (reason, error)."""
    ends: dict[str, tuple[str, str | None]] = {}
    for output in outputs:
        if output.finish_reason is not None:
            assert output.request.id not in ends, "two final outputs for one request"
            ends[output.request.id] = (str(output.finish_reason), output.error)
    return ends

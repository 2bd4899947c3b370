"""Compares calls of a small patched model with stock's, for tests that change the model between two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paged_hf import paged_generate

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
MODES: dict[str, dict[str, Any]] = {"free": {}, "lockstep": {"num_beams": 2}}


def prompts() -> dict[str, Tensor]:
    """Return three rows of the same length with a common beginning, several blocks long."""
    ids = torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[1:, :36] = ids[0, :36]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def agrees(model: Any, tier: str | None = "native") -> list[list[int]]:
    """Assert that free and lockstep calls give the tokens of the model as it is now."""
    given = {**prompts(), **GREEDY}
    for mode, own in MODES.items():
        got = model.generate(**given, **own)
        taken = paged_generate.last_report()  # type: ignore[attr-defined]
        assert tier in (None, taken.tier), (mode, taken)
        assert torch.equal(got, model.generate.stock(**given, **own)), mode
    return model.generate(**given).tolist()


class Reading(nn.Module):
    """Returns the result of ``inner``, times the number that ``factor(self)`` reads."""

    def __init__(self, inner: nn.Module, factor: Callable[[Any], Any], **held: Any) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor(self)


def hold(model: Any, factor: Callable[[Any], Any], **held: Any) -> Any:
    layer = model.model.layers[0]
    layer.mlp = Reading(layer.mlp, factor, **held)
    return layer.mlp

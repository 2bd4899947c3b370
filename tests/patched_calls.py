"""Compares calls of a small patched model with stock's, for tests that change the model between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
MODES: dict[str, dict[str, Any]] = {"free": {}, "lockstep": {"num_beams": 2}}


def prompts(seed: int = 0, rows: int = 3) -> dict[str, Tensor]:
    """Return rows of 9, 8, 7, ... tokens, padded on the left."""
    ids = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def agrees(model: Any, tier: str = "native", **options: Any) -> list[list[int]]:
    """Assert that free and lockstep calls give stock's tokens, on this tier. Returns the free call's tokens."""
    given = {**prompts(), **GREEDY, **options}
    answers = []
    for mode, own in MODES.items():
        got = model.generate(**given, **own)
        taken = model.generate.last_report()
        assert taken.tier == tier, (mode, taken)
        assert torch.equal(got, model.generate.stock(**given, **own)), mode
        answers.append(got.tolist())
    return answers[0]


def host_of(model: Any) -> Any:
    return model.generate.tiers.host


def resize(model: Any) -> None:
    """Give the model another vocabulary, with new weights."""
    torch.manual_seed(1)
    model.resize_token_embeddings(128)
    with torch.no_grad():
        model.lm_head.weight[96:].normal_(0, 1)

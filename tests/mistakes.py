"""Mistakes that an engine might make, each made by patching ours: (model type, mistake)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from paged_hf.generate import carry_out
from paged_hf.model import paged_model
from paged_hf.model.paged_model import HFPagedModel

Mutate = Callable[[pytest.MonkeyPatch], None]


def _told(**facts: Any) -> Mutate:
    """Make the engine use other facts of attention than the probe has found. (It refuses sequences longer than a window
    that no layer has; a wide window means none.)"""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        found = paged_model.probe

        def forgetful(*args: Any) -> Any:
            findings = found(*args)
            assert any(getattr(layer, name) is not None for layer in findings.layers for name in facts)
            return dataclasses.replace(
                findings, layers=tuple(dataclasses.replace(layer, **facts) for layer in findings.layers)
            )

        monkeypatch.setattr(paged_model, "probe", forgetful)

    return mutate


def _keep_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry_out, "unpadded", lambda call: call.prompts.tolist())


def _shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add one to all positions from the seventh on. If all positions were shifted, rotary embeddings would give the
    same result."""
    forward = HFPagedModel.forward

    def shifted(self: Any, token_ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        return forward(self, token_ids, positions + (positions > 5), *rest)

    monkeypatch.setattr(HFPagedModel, "forward", shifted)


MISTAKES = {
    **{f"{name}-padding": (name, _keep_padding) for name in ("llama", "gpt2", "gemma2", "mixtral", "gpt_oss")},
    **{f"{name}-positions": (name, _shift) for name in ("llama", "gpt2", "opt", "gemma3_text", "deepseek_v3")},
    **{
        f"{name}-window": (name, _told(sliding_window=4096)) for name in ("mistral", "gemma2", "gemma3_text", "gpt_oss")
    },
    "gemma2-softcap": ("gemma2", _told(softcap=None)),
    "gemma2-another-softcap": ("gemma2", _told(softcap=2.0)),
    "qwen3-scale": ("qwen3", _told(scale=0.4)),
    "gpt2-scale": ("gpt2", _told(scale=0.4)),
}

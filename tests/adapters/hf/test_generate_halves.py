"""Models of 16-bit weights, as nearly all are loaded: rounding never costs the engine, and a mistake always does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from paged_hf import embedded_folder, paged_generate
from paged_hf.generate import tiers
from paged_hf.model import paged_model, probe
from paged_hf.model.paged_model import HFPagedModel
from torch import Tensor

from paged_core import UnsupportedModel

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "qwen3", "mixtral", "gpt_oss", "deepseek_v3")
Mutate = Callable[[pytest.MonkeyPatch], None]


@HALVES
@pytest.mark.parametrize("name", FAMILIES)
def test_rounding_costs_no_model_the_engine(tiny: Any, name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    model.generate = paged_generate(model)
    assert "native" not in model.generate.tiers.dropped
    ids = torch.arange(3, 15)[None]
    for options in ({}, {"return_dict_in_generate": True}):
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, **options)
        report = model.generate.last_report()
        latents = name == "deepseek_v3" and bool(options)  # stock's cache keeps those, ours what attention sees
        assert report.tier == ("cache" if latents else "native"), report


@HALVES
def test_a_real_model_runs_natively_and_gives_back_a_cache(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=dtype)
    with caplog.at_level(logging.WARNING, "paged_hf"):
        model.generate = paged_generate(model)
    assert "paged_hf" not in caplog.text and model.generate.tiers.dropped == {}
    ids = torch.arange(100, 120)[None]
    said = model.generate(ids, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    assert model.generate.last_report().tier == "native"
    assert said.past_key_values.get_seq_length() == 22


# ---- mistakes --------------------------------------------------------------------------------------------------------


def _told(**facts: Any) -> Mutate:
    """The engine is told other facts about attention than the probe has found. (It refuses what outgrows a window that
    no layer knows of: a wide one means none.)"""

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
    monkeypatch.setattr(tiers, "prompts_of", lambda given, mask: given.tolist())


def _shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are one too high from the seventh on: all of them would be the same to rotary embeddings."""
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


@HALVES
@pytest.mark.parametrize(("name", "mutate"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_never_taken_for_rounding(
    tiny: Any, name: str, mutate: Mutate, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name).to(dtype)
    mutate(monkeypatch)
    dropped = paged_generate(model).tiers.dropped
    assert "self-check: its logits differ" in dropped["native"]
    assert "self-check" not in dropped.get("cache", "")


@HALVES
@pytest.mark.parametrize(
    ("name", "fact"), [("gemma2", "softcap"), ("gemma2", "sliding_window"), ("mistral", "sliding_window")]
)
def test_the_probe_refuses_what_it_reads_wrongly(
    tiny: Any, name: str, fact: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name).to(dtype)
    spec = probe.LayerSpec
    monkeypatch.setattr(probe, "LayerSpec", lambda **facts: spec(**{**facts, fact: None}))
    with pytest.raises(UnsupportedModel, match="its logits differ"):
        HFPagedModel(model)

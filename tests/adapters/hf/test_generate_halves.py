"""Models of 16-bit weights, as nearly all are loaded: rounding never costs the engine, and a mistake always does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers

from mistakes import MISTAKES, Mutate
from paged_core import UnsupportedModel
from paged_hf import embedded_folder, paged_generate
from paged_hf.model import probe
from paged_hf.model.paged_model import HFPagedModel

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "qwen3", "mixtral", "gpt_oss", "deepseek_v3")


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


# bfloat16 rounds the more coarsely of the two, and so hides the more.
TOLD_IN_FLOAT16 = ("llama-padding", "gpt2-positions", "mistral-window", "gemma2-softcap", "qwen3-scale")
MISTAKEN = [
    *((*mistake, torch.bfloat16) for mistake in MISTAKES.values()),
    *((*MISTAKES[case], torch.float16) for case in TOLD_IN_FLOAT16),
]


@pytest.mark.parametrize(
    ("name", "mutate", "dtype"),
    MISTAKEN,
    ids=[*(f"{case}-bfloat16" for case in MISTAKES), *(f"{case}-float16" for case in TOLD_IN_FLOAT16)],
)
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

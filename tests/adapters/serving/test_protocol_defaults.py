"""Sampling fields that a request leaves out: as the model's makers advise, or neutral."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from paged_core import AsyncEngine, EngineConfig, SamplingParams
from paged_serving import ChatCall, CompletionCall, ServedModel, TGICall
from toy_tokenizers import CharacterTokenizer

ADVICE = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
MESSAGES = [{"role": "user", "content": "Hi"}]


def served(**options: Any) -> ServedModel:
    model = AlphabetModel()
    model.spec = replace(model.spec, sampling_defaults=ADVICE)
    config = EngineConfig(num_blocks=64, attention_backend="reference")
    return ServedModel(AsyncEngine(model, tokenizer=CharacterTokenizer(), config=config), ["abc"], **options)


def chosen(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in ADVICE}


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_what_a_request_leaves_out_is_as_the_models_makers_advise(route: str) -> None:
    make, body = (CompletionCall, {"prompt": "A"}) if route == "completions" else (ChatCall, {"messages": MESSAGES})
    model = served()
    assert chosen(make(body, model, "1").params) == ADVICE
    assert chosen(make({**body, "temperature": None}, model, "1").params) == ADVICE
    assert chosen(make({**body, "temperature": 0, "top_k": -1}, model, "1").params) == {
        **ADVICE,
        "temperature": 0,
        "top_k": 0,
    }


def test_a_server_may_leave_the_advice_alone() -> None:
    neutral = chosen(SamplingParams())
    assert chosen(CompletionCall({"prompt": "A"}, served(model_defaults=False), "1").params) == neutral


def test_tgis_requests_and_beams_are_not_advised() -> None:
    model = served()
    beams = CompletionCall({"prompt": "A", "n": 2, "use_beam_search": True}, model, "1").params
    assert chosen(beams) == chosen(SamplingParams())
    body = {"inputs": "A", "parameters": {"do_sample": True}}
    assert chosen(TGICall(body, model, False).params) == chosen(SamplingParams())

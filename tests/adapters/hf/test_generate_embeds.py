"""Prompts given as embeddings run in the engine, beside prompts of tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from paged_hf import paged_generate


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    made.generate = paged_generate(made, check=False)
    return made


def test_prompts_of_embeddings_and_of_tokens_run_in_one_batch(model: Any) -> None:
    torch.manual_seed(0)
    embeds = torch.randn(6, 1, 9, 32) * 0.05
    ids = torch.randint(1, 90, (6, 1, 9))
    calls = [{"inputs_embeds": rows} for rows in embeds] + [{"inputs": rows} for rows in ids]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = [model.generate.stock(**call, **options) for call in calls]
    with ThreadPoolExecutor(12) as callers:
        got = list(callers.map(lambda call: model.generate(**call, **options), calls))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    assert not model.generate.tiers.host.paged_model._embeds._rows, "what was acquired is released"


def test_beams_over_one_prompt_of_embeddings_share_its_blocks(model: Any) -> None:
    embeds = torch.randn(1, 33, 32) * 0.05
    model.generate(inputs_embeds=embeds, max_new_tokens=3, num_beams=4, do_sample=False, pad_token_id=0)
    report = model.generate.last_report()
    assert (report.tier, report.loop) == ("native", "_beam_search")
    assert report.num_blocks_shared >= 3 * (33 // 8)


def test_embeddings_that_are_no_longer_there_are_no_tokens(model: Any) -> None:
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, do_sample=False, pad_token_id=0)  # which builds the engine
    paged = model.generate.tiers.host.paged_model
    ids = paged.acquire_ids(torch.zeros(2, 32))
    assert all(paged.knows(token) for token in ids)
    paged.release_ids(ids)
    assert not any(paged.knows(token) for token in ids)
    assert not set(ids) & set(paged.acquire_ids(torch.zeros(2, 32))), "the prefix cache would take them for the same"


class LooksAtIds(LlamaForCausalLM):
    """Ids make a difference to it, as to models that have more embeddings in their layers."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **options):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **options)
        if input_ids is not None:
            output.logits[..., 7] += 3
        return output


def test_a_model_that_looks_at_ids_beside_embeddings_is_left_to_stocks_loop(tiny: Any) -> None:
    plain = tiny("llama", num_hidden_layers=2, hidden_size=32)
    model = LooksAtIds(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    patched = paged_generate(model, check=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]])).detach()
    assert torch.equal(patched(inputs_embeds=embeds, **options), patched.stock(inputs_embeds=embeds, **options))
    assert "it makes more of token ids than embeddings" in str(patched.last_report().reason)
    assert "native" not in patched.tiers.dropped, "one call's obstacle isn't the model's"

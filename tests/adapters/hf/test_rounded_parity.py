"""What compares answers of 16-bit models: it forgives a near-tie and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generate_parity import assert_same, some_rows
from mistakes import MISTAKES, Mutate
from paged_hf import paged_generate
from rounded_parity import HALVES, Rounded

FULL = {"return_dict_in_generate": True, "output_logits": True}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "logits": {"repetition_penalty": 1.1, **FULL},
}
MADE = ["llama-positions", "gpt2-positions", "mistral-window", "gemma2-window", "gemma2-softcap", "gpt2-scale"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mistake", MADE)
def test_a_mistake_is_red(mistake: str, dtype: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, mutate = MISTAKES[mistake]
    _assert_red(tiny(name, num_hidden_layers=4).to(HALVES[dtype]), mutate, monkeypatch, {})


@pytest.mark.parametrize("call", CALLS)
def test_a_mistake_is_red_in_calls_of_each_kind(call: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, mutate = MISTAKES["llama-positions"]
    _assert_red(tiny(name).bfloat16(), mutate, monkeypatch, CALLS[call])


def _assert_red(model: Any, mutate: Mutate, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    ids, mask = some_rows((5, 17, 30, 9, 22, 26))
    given = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 6, **options}
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"behind the best|logits: off by"):
        assert_same(paged_generate(model, check=False), ids, **given, tier="native")


@pytest.mark.parametrize("dtype", HALVES)
def test_beams_at_wrong_positions_are_red(dtype: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2").to(HALVES[dtype])
    ids, mask = some_rows((8,) * 24)
    given = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 2, "num_beams": 2}
    assert assert_same(paged_generate(model, check=False), ids, **given, tier="native").num_compared >= 6
    MISTAKES["gpt2-positions"][1](monkeypatch)
    with pytest.raises(AssertionError, match="instead of"):
        assert_same(paged_generate(model, check=False), ids, **given, tier="native")


def test_of_two_tokens_the_nearer_is_forgiven_and_the_farther_is_not(tiny: Any) -> None:
    ids, mask = some_rows((5, 17, 30, 9, 22, 26))
    model = tiny("llama").bfloat16()
    judge = Rounded.of(model.generate, ids, attention_mask=mask, pad_token_id=0, max_new_tokens=6)
    read = judge.read.output.sequences
    behind = torch.stack(
        [choice.scores.max(-1).values - choice.scores.topk(2).values[:, 1] for choice in judge.read.choices]
    )
    near, far = (behind < judge.margin).nonzero(), (behind > judge.margin).nonzero()
    assert len(near) and len(far)
    judge.assert_sequences(_with_second_best(judge, *near[0].tolist()))
    assert judge.compared < read[:, ids.shape[1] :].numel()
    with pytest.raises(AssertionError, match="behind the best"):
        judge.assert_sequences(_with_second_best(judge, *far[0].tolist()))


def _with_second_best(judge: Rounded, step: int, row: int) -> torch.Tensor:
    changed = judge.read.output.sequences.clone()
    changed[row, judge.width + step] = judge.read.choices[step].scores[row].topk(2).indices[1]
    changed[row, judge.width + step + 1 :] = 0  # what follows is another text
    return changed

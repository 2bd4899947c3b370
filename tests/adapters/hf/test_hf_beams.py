"""Beams of a transformers model in the engine are those of its own generate, where both count lengths alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from paged_core import LLM, Engine, SamplingParams
from rounded_parity import HALVES, assert_rows


class NoText:
    """A tokenizer for tests that look at token ids only."""

    all_special_ids: tuple[int, ...] = ()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(65 + token) for token in token_ids)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (5, 0.0)])
def test_without_stop_tokens_all_beams_are_stocks(
    tiny: Callable[..., Any],
    engine: Callable[..., Engine],
    prompts: list[list[int]],
    model_type: str,
    width: int,
    penalty: float,
) -> None:
    model = tiny(model_type)
    llm = LLM(engine(model, max_num_seqs=8), tokenizer=NoText())
    params = SamplingParams(n=width, max_tokens=9, use_beam_search=True, length_penalty=penalty)
    for prompt, found in zip(prompts, llm.generate(prompts, params), strict=True):
        ids = torch.tensor([prompt])
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=width,
            length_penalty=penalty,
            do_sample=False,
            max_new_tokens=9,
            pad_token_id=0,
        )
        assert [list(output.token_ids) for output in found.outputs] == rows[:, len(prompt) :].tolist()
    llm.close()


@pytest.mark.parametrize("dtype", HALVES)
def test_in_16_bits_beams_differ_from_stocks_at_near_ties_alone(
    tiny: Callable[..., Any], engine: Callable[..., Engine], dtype: str
) -> None:
    model = tiny("gpt2").to(HALVES[dtype])
    prompts = [[7 * i % 90 + 3, 50, 41 + i, 6, 30 + 2 * i] for i in range(24)]
    llm = LLM(engine(model, max_num_seqs=8), tokenizer=NoText())
    found = llm.generate(prompts, SamplingParams(n=2, max_tokens=2, use_beam_search=True))
    answers = [[list(output.token_ids) for output in each.outputs] for each in found]
    llm.close()
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 2}
    assert assert_rows(model, prompts, answers, **options) >= 6


@pytest.mark.parametrize("seed", [0, 1])
def test_of_the_sequences_that_stock_sets_aside_none_is_missed_and_likelier_ones_are_found(
    tiny: Callable[..., Any], engine: Callable[..., Engine], prompts: list[list[int]], seed: int
) -> None:
    """A stop token that stock finds below the step's best ``width`` ends nothing there; by vLLM's rules it does."""
    model, width = tiny("llama", seed=seed), 4
    params = SamplingParams(n=width, max_tokens=9, use_beam_search=True, length_penalty=0.0)
    both_end = 0
    for prompt in prompts:
        (beams,) = _searched(engine, model, prompt, params)
        eos = beams.outputs[0].token_ids[4]  # the best beam would go through it
        model.generation_config.eos_token_id = eos
        (found,) = _searched(engine, model, prompt, params)
        model.generation_config.eos_token_id = None
        ours = {tuple(output.token_ids): output.cumulative_logprob for output in found.outputs}
        rows = _stocks(model, prompt, width, eos)
        assert found.outputs[0].cumulative_logprob >= max(rows.values()) - 1e-4
        for tokens, total in rows.items():
            assert total <= min(ours.values()) + 1e-4 or ours[tokens] == pytest.approx(total, abs=1e-3)
        both_end += sum(tokens in ours and tokens[-1] == eos for tokens in rows)
    assert both_end >= 2


def _searched(engine: Callable[..., Engine], model: Any, prompt: list[int], params: SamplingParams) -> Any:
    llm = LLM(engine(model, max_num_seqs=8), tokenizer=NoText())
    found = llm.generate(prompt, params)
    llm.close()
    return found


def _stocks(model: Any, prompt: list[int], width: int, eos: int) -> dict[tuple[int, ...], float]:
    """Stock's sequences and the sums of their log-probabilities."""
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=0.0,
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = answer.sequences[:, len(prompt) :].tolist()
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return {tuple(row): total for row, total in zip(ended, answer.sequences_scores.tolist(), strict=True)}

"""The sampler against plain per-row references: what each parameter does, alone and mixed with others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_core.sampling.draw import argmax_rows, top_rows, uniform
from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request
from sampler_rows import NINF, logits_of, request, select

# ---- the reference: one row, obvious steps, float64 ------------------------------------------------------------


def reference_scores(logits: torch.Tensor, r: Request) -> list[float]:
    """A row's scores after everything that comes before temperature."""
    p, scores = r.params, logits.tolist()
    output, prompt = r.tokens[r.num_prompt :], r.tokens[: r.num_prompt]
    for id in range(len(scores)):
        if p.allowed_token_ids is not None and id not in p.allowed_token_ids:
            scores[id] = NINF
        if len(output) < p.min_tokens and id in r.stop_token_ids:
            scores[id] = NINF
        for *before, last in p.bad_words_token_ids:
            if last == id and r.tokens[len(r.tokens) - len(before) :] == before:
                scores[id] = NINF
        scores[id] += (p.logit_bias or {}).get(id, 0)
        if id in prompt + output:
            scores[id] = scores[id] / p.repetition_penalty if scores[id] > 0 else scores[id] * p.repetition_penalty
        scores[id] -= p.frequency_penalty * output.count(id)
        scores[id] -= p.presence_penalty * (id in output)
    row = torch.tensor([scores])
    for processor in p.logits_processors:
        row = processor(torch.tensor([r.tokens]), row)
    return row[0].tolist()


def reference_kept(scores: list[float], p: SamplingParams) -> list[tuple[int, float]]:
    """The tokens that may be drawn, likeliest first, and their weights."""
    top = max(scores)
    weights = [math.exp((score - top) / p.temperature) for score in scores]
    weights = [weight if weight >= p.min_p else 0.0 for weight in weights]
    order = sorted(range(len(scores)), key=lambda id: (-scores[id], id))
    if p.top_k:
        order = order[: p.top_k]
    limit = p.top_p * math.fsum(weights[id] for id in order)
    kept, mass = [], 0.0
    for id in order:
        if mass >= limit:
            break
        if weights[id] > 0:
            kept.append((id, weights[id]))
            mass += weights[id]
    return kept


def reference_token(logits: torch.Tensor, r: Request) -> int:
    scores = reference_scores(logits, r)
    if r.params.greedy:
        return scores.index(max(scores))
    kept = reference_kept(scores, r.params)
    if not r.params.top_k and r.params.top_p == 1:
        kept.sort()  # rows without a cut by rank are drawn in order of id
    target = uniform(r) * math.fsum(weight for _, weight in kept)
    mass = 0.0
    for id, weight in kept:
        mass += weight
        if mass > target:
            return id
    return kept[-1][0]


def halve(input_ids, scores):
    return scores * 0.5


def forbid_last_token(input_ids, scores):
    scores[0, input_ids[0, -1]] = NINF
    return scores


MIX = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 200, "temperature": 1.3},
    {"top_p": 0.6},
    {"top_p": 0.97, "temperature": 2.5},
    {"top_p": 0.9, "top_k": 20},
    {"min_p": 0.05},
    {"min_p": 0.02, "top_p": 0.9, "top_k": 30, "temperature": 1.2},
    {"repetition_penalty": 1.7, "temperature": 0},
    {"repetition_penalty": 0.6, "temperature": 0.9},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.8},
    {"presence_penalty": -1.5, "temperature": 0},
    {"logit_bias": {3: 5.0, 7: -100.0}, "top_k": 4},
    {"bad_words_token_ids": [[5], [2, 9], [1, 2, 11], [8, 8]], "temperature": 0.5},
    {"allowed_token_ids": [4, 250, 17], "temperature": 3.0},
    {"allowed_token_ids": [250], "temperature": 0},
    {"min_tokens": 6, "stop": (0, 1, 2, 3), "temperature": 0.4},
    {"logits_processors": [halve, forbid_last_token], "temperature": 0.6},
    {"logits_processors": [halve], "top_p": 0.5},
    {"temperature": 1e-30},
    {"temperature": 1e6, "top_k": 3},
]


def mixed_requests(output=(2, 9, 2, 40), seed=0) -> list[Request]:
    made = []
    for number, params in enumerate(MIX):
        params = dict(params)
        made.append(
            request((1, 2, 2, 30), output, seed=seed + number, index=number % 3, stop=params.pop("stop", ()), **params)
        )
    return made


@pytest.mark.parametrize("vocab", [300, 1024, 1100])
def test_a_mixed_batch_gives_each_row_what_its_own_reference_says(vocab):
    for seed in range(12):
        requests = mixed_requests(seed=1000 * seed)
        logits = logits_of(len(requests), vocab, seed)
        if seed % 3 == 0:
            logits = logits.round()  # many equals, also where a cut falls
        assert select(logits, requests).token_ids == [
            reference_token(row, r) for row, r in zip(logits, requests, strict=True)
        ]


def test_a_history_that_grows_token_by_token_agrees_with_the_reference_at_every_step():
    sampler, requests = Sampler(), mixed_requests(output=())
    for step in range(12):
        logits = logits_of(len(requests), 300, step)
        chosen = select(logits, requests, sampler).token_ids
        assert chosen == [reference_token(row, r) for row, r in zip(logits, requests, strict=True)]
        for r, token in zip(requests, chosen, strict=True):
            r.tokens.append(token % 12)  # few tokens, so that repeats and bad words come up


@settings(max_examples=40)
@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    scale=st.sampled_from([0.0, 0.1, 2.0, 30.0]),
    vocab=st.integers(1, 400),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_a_drawn_token_is_always_one_that_the_parameters_keep(temperature, top_k, top_p, min_p, scale, vocab, seed):
    logits = (logits_of(1, vocab, seed % 1000) * scale).round(decimals=1)  # rounded, so that ties happen
    r = request(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = select(logits, [r]).token_ids[0]
    if r.params.greedy:
        assert token == int(logits[0].argmax())
    else:
        # a cut within rounding of top_p may fall one token later
        wider = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=min(1.0, top_p + 1e-5), min_p=min_p * (1 - 1e-5)
        )
        assert token in dict(reference_kept(logits[0].tolist(), wider))


# ---- greedy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 7, 128, 129, 5000])
def test_greedy_is_argmax_with_the_lowest_id_among_equals(dtype, vocab):
    logits = logits_of(20, vocab).round().to(dtype)  # rounded: many ties
    requests = [request(temperature=0) for _ in range(20)]
    assert select(logits, requests).token_ids == [row.tolist().index(max(row.tolist())) for row in logits]


def test_temperature_0_and_top_k_1_are_the_same_path():
    logits = logits_of(8, 1000).round()
    zero = select(logits, [request(temperature=0) for _ in range(8)])
    one = select(logits, [request(top_k=1, temperature=1.7, seed=row) for row in range(8)])
    assert zero == one


def test_logits_that_are_a_strided_view_are_read_right():
    wide = logits_of(5, 700)
    assert Sampler().select(wide[:, 50:650], [request(temperature=0)] * 5).token_ids == (
        wide[:, 50:650].argmax(1).tolist()
    )


def test_an_injected_argmax_is_the_one_used():
    def backwards(scores):
        return scores.argmin(1), scores.amin(1)

    logits = logits_of(3)
    chosen = Sampler(argmax=backwards).select(logits.clone(), [request(temperature=0)] * 3).token_ids
    assert chosen == logits.argmin(1).tolist()


@settings(max_examples=30)
@given(vocab=st.integers(1, 3000), k=st.integers(1, 40), levels=st.integers(1, 50), seed=st.integers(0, 999))
def test_the_k_largest_come_by_value_then_by_id(vocab, k, levels, seed):
    scores = torch.randint(-levels, levels, (3, vocab), generator=torch.Generator().manual_seed(seed)).float()
    k = min(k, vocab)
    values, ids = top_rows(scores, k)
    for row in range(3):
        order = sorted(range(vocab), key=lambda id: (-scores[row, id].item(), id))[:k]
        assert ids[row].tolist() == order
        assert values[row].tolist() == scores[row, order].tolist()


def test_the_k_largest_treat_minus_zero_as_zero_and_minus_infinity_as_least():
    scores = torch.tensor([[-0.0, 0.0, NINF, -1.0]])
    assert top_rows(scores, 4)[1].tolist() == [[0, 1, 3, 2]]


def test_argmax_rows_answers_nan_for_a_row_that_holds_one():
    scores = logits_of(2, 500)
    scores[1, 333] = math.nan
    ids, largest = argmax_rows(scores)
    assert largest[0] == scores[0].max() and ids[0] == scores[0].argmax()
    assert largest[1].isnan() and ids[1] == 333

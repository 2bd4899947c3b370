"""A row gets the same token alone and in any batch."""

from __future__ import annotations

import math

import pytest
import torch

from case_ids import told
from paged_core.sampling.draw import uniform
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request
from sampler_ways import VOCAB, choose, logits_of, rows, select


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_alone_in_any_batch_and_in_any_order(dtype):
    requests = rows()
    logits = logits_of(len(requests)).to(dtype)
    together = select(logits, requests).token_ids
    alone = [select(logits[row : row + 1], [r]).token_ids[0] for row, r in enumerate(requests)]
    assert together == alone
    for shuffle in range(3):
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(shuffle)).tolist()
        order = order[: len(order) - 5 * shuffle]
        assert select(logits[order], [requests[row] for row in order]).token_ids == [together[row] for row in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_chosen_ahead_is_the_one_that_is_selected_once_the_token_before_is_known(dtype):
    requests = [r for r in rows() if choose(logits_of(1), [r])]
    assert len(requests) == 3 * 6
    logits = logits_of(len(requests)).to(dtype)
    untouched = logits.clone()
    ahead = choose(logits, requests, 1)
    alone = [choose(logits[row : row + 1], [r], 1).fetch().token_ids[0] for row, r in enumerate(requests)]
    assert torch.equal(logits, untouched), "who selects after all finds the logits as they were"
    too_early = select(logits, requests)
    for r in requests:
        r.tokens.append(9)
    truth = select(logits, requests)
    assert ahead.fetch() == truth != too_early
    assert ahead.token_ids.tolist() == alone == truth.token_ids
    assert ahead.keep([1, 5]).fetch().token_ids == [truth.token_ids[1], truth.token_ids[5]]


@pytest.mark.parametrize(
    "way",
    [
        {"top_p": 0.9},
        {"temperature": 0, "logprobs": 1},
        {"presence_penalty": 0.5},
        {"logits_processors": [lambda input_ids, scores: scores]},
        {"allowed_token_ids": [VOCAB]},
    ],
    ids=told,
)
def test_a_batch_with_a_row_that_needs_the_host_is_not_chosen_ahead(way):
    plain, other = (Request("r", [1], SamplingParams(**params)) for params in ({}, way))
    assert choose(logits_of(2), [plain, plain]) is not None
    assert choose(logits_of(2), [plain, other]) is None


def test_the_sums_behind_a_draw_are_the_same_to_the_bit_alone_and_in_a_batch():
    from paged_core.sampling import draw

    requests = [r for r in rows() if not r.params.greedy]
    logits = logits_of(len(requests))
    peaks = logits.amax(1)
    batch = draw._Rows(logits.clone(), peaks, requests).weights()
    sums = draw._sums(batch)
    for row, r in enumerate(requests):
        one = draw._Rows(logits[row : row + 1].clone(), peaks[row : row + 1], [r]).weights()
        assert torch.equal(one[0], batch[row])
        assert torch.equal(draw._sums(one)[0], sums[row])


def test_the_number_of_threads_changes_no_token():
    requests, before = rows(), torch.get_num_threads()
    logits = logits_of(len(requests))
    try:
        torch.set_num_threads(1)
        one = select(logits, requests).token_ids
    finally:
        torch.set_num_threads(before)
    assert select(logits, requests).token_ids == one


def test_copies_of_a_request_differ_and_each_is_repeatable():
    params = SamplingParams(n=8, temperature=1.0)
    copies = [Request("r", [1], params, seed=3, index=index) for index in range(8)]
    logits = logits_of(1).expand(8, -1)
    first = select(logits, copies).token_ids
    assert len(set(first)) > 4
    assert select(logits, copies).token_ids == first


def test_the_random_number_depends_on_seed_index_and_position_only():
    def number(seed=1, index=2, output=3, prompt=4):
        r = Request("any", [0] * prompt, SamplingParams(), seed=seed, index=index)
        r.tokens += [9] * output
        return uniform(r)

    assert number() == number(prompt=11)
    others = {number(seed=2), number(seed=-1), number(index=1), number(output=4), number(seed=12, index=2, output=3)}
    assert len(others | {number()}) == 6
    assert all(0 <= value < 1 for value in others)


def test_random_numbers_are_spread_evenly():
    counts = [0] * 20
    for seed in range(4000):
        counts[int(20 * uniform(Request("r", [1], SamplingParams(), seed=seed)))] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 43.8  # chi-square, 19 degrees, p = 0.001


@pytest.mark.parametrize(
    "way",
    [{}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_tokens_come_as_often_as_their_probabilities_say(way):
    vocab, draws = 12, 6000
    logits = torch.linspace(2, -2, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))]
    params = SamplingParams(**way)
    probabilities = (logits.double() / params.temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    keep = probabilities >= params.min_p * probabilities.max()
    if params.top_k:
        keep[order[params.top_k :]] = False
    if params.top_p < 1:
        within = torch.where(keep, probabilities, 0)[order] / probabilities[keep].sum()
        keep[order[(within.cumsum(0) - within) >= params.top_p]] = False
    probabilities = torch.where(keep, probabilities, 0) / probabilities[keep].sum()

    requests = [Request("r", [1], params, seed=seed) for seed in range(draws)]
    counts = torch.bincount(torch.tensor(select(logits.expand(draws, -1), requests).token_ids), minlength=vocab)
    assert counts[~keep].sum() == 0
    expected = probabilities[keep] * draws
    chi_square = ((counts[keep] - expected) ** 2 / expected).sum().item()
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001: enough for fewer degrees too


def test_a_token_of_no_probability_is_never_drawn_at_either_end_of_the_uniform(monkeypatch):
    from paged_core.sampling import draw

    logits = torch.full((1, 300), -math.inf)
    logits[0, 40:260] = 0.0
    for u, first in ((0.0, 40), (1 - 2.0**-53, 259)):
        monkeypatch.setattr(draw, "uniform", lambda *_, u=u: u)
        for way in ({}, {"top_p": 0.999999999}, {"top_k": 220}, {"min_p": 0.5}):
            r = Request("r", [1], SamplingParams(**way))
            assert select(logits, [r]).token_ids == [first], way


@pytest.mark.parametrize("vocab", [40, 64, 256, 1000])
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass_and_of_equals_the_lowest_ids(vocab, monkeypatch):
    from paged_core.sampling import draw

    monkeypatch.setattr(draw, "uniform", lambda *_: 1 - 2.0**-53)
    r = Request("r", [1], SamplingParams(top_p=0.5))
    assert select(torch.zeros(1, vocab), [r]).token_ids == [vocab // 2 - 1]

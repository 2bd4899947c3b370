"""A row gets the same token alone and in any batch, and what fails in one row stays there."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from case_ids import told
from paged_core.plugins import load_plugins
from paged_core.sampling.draw import top_rows, uniform
from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request

VOCAB = 2500
WAYS = [
    {"temperature": 0},
    {"temperature": 0.9},
    {"temperature": 0.05},
    {"min_p": 0.01},
    {"top_k": 40},
    {"top_k": 3, "top_p": 0.8},
    {"top_p": 0.9},
    {"top_p": 0.95, "temperature": 4.0},  # a nucleus of many hundreds
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "temperature": 0.8},
    {"logit_bias": {1: 3.0}, "bad_words_token_ids": [[3]], "top_k": 1000},
]


def rows(copies: int = 3) -> list[Request]:
    made = []
    for number in range(copies * len(WAYS)):
        params = SamplingParams(max_tokens=None, **WAYS[number % len(WAYS)])
        r = Request("r", [1, 2, 3], params, seed=number, index=number % 4)
        r.tokens += [5, 6, 5]
        made.append(r)
    return made


def logits_of(rows: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)) * scale


def select(logits, requests):
    return Sampler().select(logits.clone(), requests)


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


def choose(logits, requests, num_unknown=0):
    return Sampler().choose(logits, requests, num_unknown)


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


# ---- errors ----------------------------------------------------------------------------------------------------


def raises(input_ids, scores):
    raise RuntimeError("my own bug")


def returns_shape(input_ids, scores):
    return scores[:, :-1]


def returns_none(input_ids, scores):
    return None


def returns_integers(input_ids, scores):
    return scores.long()


def leaves_nan(input_ids, scores):
    scores[0, 9] = math.nan
    return scores


def leaves_inf(input_ids, scores):
    return scores.index_fill(1, torch.tensor([9]), math.inf)


def forbids_all(input_ids, scores):
    return torch.full_like(scores, -math.inf)


FAULTS = [
    (raises, "logits processor raises raised RuntimeError: my own bug"),
    (returns_shape, "logits processor returns_shape returned shape [1, 2499], not [1, 2500]"),
    (returns_none, "logits processor returns_none returned NoneType, not a tensor"),
    (returns_integers, "logits processor returns_integers returned torch.int64, not floating-point scores"),
    (leaves_nan, "logits processor leaves_nan left NaN in the scores"),
    (leaves_inf, "logits processor leaves_inf left +inf in the scores"),
    (forbids_all, "after logits processor forbids_all every token is forbidden (all scores are -inf)"),
]


@pytest.mark.parametrize(("processor", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_processor_that_fails_ends_its_own_row_only(processor, message, temperature):
    requests = rows(1)
    logits = logits_of(len(requests) + 1)
    healthy = select(logits[:-1], requests).token_ids
    bad = Request("bad", [1], SamplingParams(temperature=temperature, logits_processors=[processor], logprobs=1))
    selection = select(torch.cat([logits[-1:], logits[:-1]]), [bad, *requests])
    assert selection.errors == {0: message}
    assert selection.token_ids[1:] == healthy
    assert 0 <= selection.token_ids[0] < VOCAB
    assert selection.logprobs[0] is None


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (math.nan, "the model's logits hold NaN"),
        (math.inf, "the model's logits hold +inf"),
        (-math.inf, "the model's logits are -inf for every token"),
    ],
)
@pytest.mark.parametrize("only_greedy", [True, False])
def test_logits_that_are_not_numbers_end_their_own_row_only(fill, message, only_greedy):
    requests = rows(1)
    if only_greedy:
        requests = [Request("r", [1], SamplingParams(temperature=0)) for _ in requests]
    logits = logits_of(len(requests))
    healthy = select(logits, requests).token_ids
    for row in range(len(requests)):
        spoilt = logits.clone()
        spoilt[row, slice(None) if fill < 0 else 1234] = fill
        selection = select(spoilt, requests)
        assert list(selection.errors) == [row]
        assert row or selection.errors[row] == message
        assert [t for other, t in enumerate(selection.token_ids) if other != row] == [
            t for other, t in enumerate(healthy) if other != row
        ]
        assert 0 <= selection.token_ids[row] < VOCAB


@pytest.mark.parametrize("fill", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
def test_such_logits_end_their_own_row_when_it_is_chosen_ahead_too(fill):
    requests = [r for r in rows(1) if choose(logits_of(1), [r])]
    logits = logits_of(len(requests))
    for row in range(len(requests)):
        for broken in (slice(None), slice(VOCAB - 4), slice(2496, None), 1234):
            spoilt = logits.clone()
            spoilt[row, broken] = fill
            ahead = choose(spoilt, requests)
            assert ahead.fetch() == select(spoilt, requests)
            assert int(ahead.token_ids.min()) >= 0 and int(ahead.token_ids.max()) < VOCAB


@pytest.mark.parametrize("k", [1, 19, 40])
def test_the_k_largest_of_a_row_that_holds_nan_are_tokens_of_the_vocabulary(k):
    scores = logits_of(4)
    minus_nan = torch.tensor(0xFFC00000 - 2**32, dtype=torch.int32).view(torch.float32)
    scores[0, : VOCAB - 4] = scores[1, 7] = scores[2, VOCAB - 4 :] = minus_nan
    scores[3] = math.nan
    ids = top_rows(scores, k)[1]
    assert int(ids.min()) >= 0 and int(ids.max()) < VOCAB


def test_nan_of_the_model_is_not_blamed_on_a_processor():
    logits = logits_of(1)
    logits[0, 5] = math.nan
    r = Request("r", [1], SamplingParams(logits_processors=[lambda input_ids, scores: scores]))
    assert select(logits, [r]).errors == {0: "the model's logits hold NaN"}


def test_constraints_that_leave_no_token_end_the_row_with_that_message():
    r = Request("r", [1], SamplingParams(allowed_token_ids=[4], bad_words_token_ids=[[4]]))
    selection = select(logits_of(2), [r, Request("ok", [1], SamplingParams(temperature=0))])
    assert selection.errors == {
        0: "no token is left to choose: the request's constraints together forbid the whole vocabulary"
    }


@pytest.mark.parametrize("params", [{"allowed_token_ids": [1, VOCAB]}, {"logit_bias": {-1: 2.0}}], ids=str)
def test_a_token_id_outside_the_vocabulary_is_told_to_its_own_request(params):
    other = Request("ok", [1], SamplingParams(temperature=0))
    selection = select(logits_of(2), [other, Request("r", [1], SamplingParams(**params))])
    assert list(selection.errors) == [1]
    assert "the vocabulary has ids 0 to 2499" in selection.errors[1]
    assert selection.token_ids[0] == int(logits_of(2)[0].argmax())


def test_an_empty_bad_word_is_told_to_its_own_request():
    r = Request("r", [1], SamplingParams(bad_words_token_ids=[[4], []]))
    assert "bad_words_token_ids holds an empty sequence" in select(logits_of(1), [r]).errors[0]


def test_all_rows_may_fail_at_once():
    requests = [Request("r", [1], SamplingParams(logits_processors=[raises])) for _ in range(3)]
    assert sorted(select(logits_of(3), requests).errors) == [0, 1, 2]


def test_no_rows_is_no_work():
    assert select(torch.zeros(0, 10), []).token_ids == []


def test_a_healthy_step_reports_no_errors_and_no_logprobs():
    selection = select(logits_of(2), [Request("r", [1], SamplingParams(temperature=0)) for _ in range(2)])
    assert selection.errors is None and selection.logprobs is None


def test_logits_that_carry_a_gradient_are_welcome():
    logits = logits_of(2).requires_grad_()
    requests = [Request("r", [1], SamplingParams(seed=1)), Request("r", [1], SamplingParams(temperature=0))]
    assert Sampler().select(logits * 1, requests).token_ids[1] == int(logits[1].argmax())


def test_the_sampler_of_an_engine_on_a_cpu_chooses_as_the_plain_one():
    spec = SimpleNamespace(device=torch.device("cpu"))
    builtin = load_plugins().hook.create_sampler(spec=spec, config=None)
    logits = logits_of(6)
    logits[1, 3] = logits[1, 7] = 99.0  # equals: the first wins
    logits[2, 5] = float("nan")
    logits[4] = float("-inf")
    requests = [Request(str(i), [1], SamplingParams(temperature=0)) for i in range(6)]
    ours, plain = builtin.select(logits.clone(), requests), Sampler().select(logits.clone(), requests)
    assert ours.errors == plain.errors
    assert set(ours.errors) == {2, 4}
    assert [t for i, t in enumerate(ours.token_ids) if i not in ours.errors] == [
        t for i, t in enumerate(plain.token_ids) if i not in plain.errors
    ]

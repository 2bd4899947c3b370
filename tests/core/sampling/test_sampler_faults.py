"""What fails in one row of a batch stays there: processors, logits, constraints."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from paged_core.plugins import load_plugins
from paged_core.sampling.draw import top_rows
from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request
from sampler_ways import VOCAB, choose, logits_of, rows, select


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

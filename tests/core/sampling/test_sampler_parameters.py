"""Each sampling parameter does what it says, processors see what they are to see, and logprobs are the raw logits'."""

from __future__ import annotations

import gc

import pytest
import torch

from paged_core.sampling.sampler import Sampler
from paged_core.scheduling.request import Logprob
from sampler_rows import NINF, greedy_token, logits_of, request, select

# ---- single parameters -----------------------------------------------------------------------------------------


def test_bad_words_forbid_the_last_token_only_after_the_preceding_ones():
    logits = torch.zeros(10)
    logits[4], logits[5] = 2.0, 1.0
    words = [[7, 8, 4]]
    assert greedy_token(logits, output=[7], bad_words_token_ids=words) == 4
    assert greedy_token(logits, output=[8], bad_words_token_ids=words) == 4
    assert greedy_token(logits, output=[7, 8], bad_words_token_ids=words) == 5
    assert greedy_token(logits, prompt=[3, 7], output=[8], bad_words_token_ids=words) == 5
    assert greedy_token(logits, prompt=[8], bad_words_token_ids=words) == 4
    assert greedy_token(logits, bad_words_token_ids=[[4]]) == 5


def test_no_stop_token_comes_before_min_tokens():
    logits = torch.arange(10.0)
    stop = (9, 8, 10_000)  # tokenizers may know stop tokens that the model does not
    assert greedy_token(logits, stop=stop, min_tokens=2) == 7
    assert greedy_token(logits, output=[1], stop=stop, min_tokens=2) == 7
    assert greedy_token(logits, output=[1, 1], stop=stop, min_tokens=2) == 9


def test_repetition_counts_prompt_and_output_but_presence_and_frequency_count_output_only():
    logits = torch.tensor([0.0, 4.0, 3.9, -5.0])
    assert greedy_token(logits, prompt=[1], repetition_penalty=1.1) == 2
    assert greedy_token(logits, prompt=[3], output=[1], repetition_penalty=1.1) == 2
    assert greedy_token(logits, prompt=[1], presence_penalty=1.0) == 1
    assert greedy_token(logits, prompt=[3], output=[1], presence_penalty=1.0) == 2
    assert greedy_token(logits, prompt=[1], frequency_penalty=2.0) == 1
    assert greedy_token(logits, prompt=[3], output=[1, 3, 1], frequency_penalty=0.06) == 2
    assert greedy_token(logits, prompt=[3], output=[1, 3], frequency_penalty=0.06) == 1


def test_a_history_that_was_replaced_is_counted_anew():
    logits = torch.tensor([[0.0, 4.0, 3.9, 3.8, -9.0]])
    r, sampler = request([0], [1, 2], temperature=0, presence_penalty=9.0), Sampler()
    assert select(logits, [r], sampler).token_ids == [3]
    r.tokens[:] = [0, 3, 4]  # in place, as long as before
    assert select(logits, [r], sampler).token_ids == [1]
    r.tokens = [0, 1, 4, 4]  # another list, longer
    assert select(logits, [r], sampler).token_ids == [2]
    r.tokens[:] = [0, 2]  # shorter
    assert select(logits, [r], sampler).token_ids == [1]
    r.tokens[:] = [0, 1, 2, *[4] * 20]
    assert select(logits, [r], sampler).token_ids == [3]
    r.tokens = [0, 2, 3, *[4] * 21]  # another list that ends as the one before did
    assert select(logits, [r], sampler).token_ids == [1]


def test_state_dies_with_its_request():
    sampler, r = Sampler(), request(temperature=0, presence_penalty=1.0)
    select(logits_of(1), [r], sampler)
    assert sampler.num_edited == 1
    del r
    gc.collect()
    assert sampler.num_edited == 0


def test_processors_see_the_whole_history_and_float32_scores_after_the_penalties():
    seen = []

    def look(input_ids, scores):
        seen.append((input_ids, scores))
        return scores

    logits = logits_of(2, 50).bfloat16()
    r = request([5, 6, 7], [8, 9], temperature=0, presence_penalty=2.0, logits_processors=[look])
    select(logits, [request(temperature=0), r])
    input_ids, scores = seen[0]
    assert input_ids.dtype == torch.int64 and input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert scores.dtype == torch.float32 and scores.shape == (1, 50)
    assert scores[0, 8] == logits[1, 8].float() - 2.0
    assert not scores.is_inference() and not scores.requires_grad


def test_what_a_processor_does_later_to_its_scores_reaches_no_row():
    kept = []

    def keep(input_ids, scores):
        for old in kept:
            old.zero_()
        kept.append(scores)
        return scores

    logits = logits_of(3)
    rows = [request(temperature=0, logits_processors=[keep]) for _ in range(3)]
    assert select(logits, rows).token_ids == logits.argmax(1).tolist()


def test_processors_of_transformers_form_with_state_keep_it_per_request():
    class Ramp:
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return torch.full_like(scores, NINF).index_fill(1, torch.tensor([self.calls]), 0.0)

    sampler = Sampler()
    a, b = (request(temperature=0.5, logits_processors=[Ramp()]) for _ in range(2))
    assert select(logits_of(1), [a], sampler).token_ids == [1]
    assert select(logits_of(2), [b, a], sampler).token_ids == [1, 2]


# ---- log-probabilities -----------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits_with_the_chosen_token_first():
    logits = logits_of(4, 500)
    expected = torch.log_softmax(logits, -1)
    requests = [
        request(temperature=0, logprobs=3),
        request(temperature=2.0, seed=4, logprobs=2, logit_bias={9: 50.0}),
        request(temperature=0),
        request(temperature=1.5, seed=5, top_k=40, logprobs=0, presence_penalty=1.0),
    ]
    selection = select(logits, requests)
    assert selection.token_ids[1] == 9
    assert selection.logprobs[2] is None
    for row, num in ((0, 3), (1, 2), (3, 0)):
        found, chosen = selection.logprobs[row], selection.token_ids[row]
        order = expected[row].argsort(descending=True).tolist()
        assert next(iter(found)) == chosen
        assert set(found) == {chosen, *order[:num]}
        for token, (logprob, rank) in found.items():
            assert logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
            assert order[rank - 1] == token


def test_equally_likely_tokens_share_a_rank():
    selection = select(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), [request(temperature=0, logprobs=4)])
    assert [(id, found.rank) for id, found in selection.logprobs[0].items()] == [(1, 1), (2, 1), (0, 3), (3, 4)]


def test_more_logprobs_than_tokens_gives_every_token():
    selection = select(logits_of(1, 6), [request(temperature=0, logprobs=50)])
    assert sorted(selection.logprobs[0]) == list(range(6))


def test_prompt_logprobs_tell_the_token_that_followed_and_the_likeliest():
    logits = logits_of(3, 400).bfloat16()
    expected = torch.log_softmax(logits.float(), -1)
    told = list(Sampler().prompt_logprobs(logits, [7, 8, 399], 2))
    for row, (token, found) in enumerate(zip([7, 8, 399], told, strict=True)):
        assert next(iter(found)) == token
        assert found[token].logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
        assert all(isinstance(entry, Logprob) for entry in found.values())
        assert set(found) == {token, *expected[row].topk(2).indices.tolist()}
    assert next(iter(Sampler().prompt_logprobs(logits, [1, 2, 3], 0))).keys() == {1}


def test_the_model_s_logprobs_are_untouched_by_what_other_rows_ask():
    logits = logits_of(2)
    alone = select(logits[:1], [request(temperature=0, logprobs=2)]).logprobs[0]
    beside = select(logits, [request(temperature=0, logprobs=2), request(temperature=0.3, top_p=0.5)]).logprobs[0]
    assert alone == beside

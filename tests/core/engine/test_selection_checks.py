"""What a selector or sampler answers is looked at before it is believed, and a step of selection is all or nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bad_request import PROMPT, MyOwn, assert_only_bad_failed, make_engine, run
from paged_core import (
    FinishReason,
    InvalidRequestError,
    SamplingParams,
    Selection,
    hookimpl,
)
from paged_core.sampling.sampler import Sampler
from tiny_engine import greedy
from tiny_model import VOCAB, TinyModel

# ---- a step of selection is all or nothing -----------------------------------------------------------------------


class NarrowSampler(Sampler):
    """Has no memory for more than one row, once it has gone through all of them."""

    def _tokens(self, scores: Any, requests: Any, *rest: Any) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("no room for so many rows")
        return super()._tokens(scores, requests, *rest)


NARROW = SimpleNamespace(create_sampler=hookimpl(lambda spec: NarrowSampler()))


def test_a_sampler_without_memory_makes_no_search_count_its_step_twice() -> None:
    found = []
    for plugins in ((), (NARROW,)):
        engine = make_engine(plugins=plugins)
        beams = SamplingParams(n=3, max_tokens=8, use_beam_search=True)
        (first, *_) = engine.add_request("beams", PROMPT, beams)
        for i in range(3):
            engine.add_request(str(i), [i, 1], greedy(12))
        ends = run(engine)
        assert [ends[str(i)].request.output_token_ids for i in range(3)] == [
            TinyModel().generate([i, 1], 12) for i in range(3)
        ]
        found.append([(beam.token_ids, round(beam.score, 5)) for beam in first.selector.best])
    assert found[0] == found[1]


def test_nor_is_any_other_selector_or_processor_asked_twice_for_a_step() -> None:
    class Counting:
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def select(self, logits: Any, requests: Any) -> Selection:
            self.lengths.append(len(requests[0].tokens))
            return Selection(logits.argmax(-1).tolist())

    seen: list[int] = []

    def processor(input_ids: Any, scores: Any) -> Any:
        seen.append(input_ids.shape[1])
        return scores

    engine, own = make_engine(plugins=[NARROW]), Counting()
    engine.add_group("own", [PROMPT, PROMPT], greedy(6), selector=own)
    engine.add_request("plain", PROMPT, greedy(6))
    engine.add_request("edited", PROMPT, greedy(6, logits_processors=[processor]))
    ends = run(engine)
    assert own.lengths == seen == list(range(len(PROMPT), len(PROMPT) + 6))
    assert {tuple(end.request.output_token_ids) for end in ends.values()} == {tuple(TinyModel().generate(PROMPT, 6))}


def test_a_row_that_memory_has_no_room_for_ends_alone() -> None:
    class Tiny(NarrowSampler):
        def _tokens(self, scores: Any, requests: Any, *rest: Any) -> Any:
            if requests[0].id == "bad" and requests[0].num_output == 2:
                raise torch.OutOfMemoryError("not for this one")
            return super()._tokens(scores, requests, *rest)

    engine = make_engine(plugins=[SimpleNamespace(create_sampler=hookimpl(lambda spec: Tiny()))])
    engine.add_request("bad", PROMPT, greedy(9))
    assert_only_bad_failed(engine, "not for this one")


# ---- what is answered is looked at -------------------------------------------------------------------------------

MALFORMED = {
    "negative": (lambda n: Selection([-5] * n), "-5 was chosen; token ids go from 0 to 96"),
    "beyond": (lambda n: Selection([VOCAB] * n), "97 was chosen"),
    "no int": (lambda n: Selection([1.5] * n), "1.5 was chosen"),
    "short": (lambda n: Selection([1] * (n - 1)), "token_ids must have one entry a row, 2, and not 1 entries"),
    "long": (lambda n: Selection([1] * (n + 1)), "not 3 entries"),
    "no list": (lambda n: Selection(7), "not 7"),
    "none": (lambda n: None, "must answer a Selection, and not a NoneType"),
    "tensor": (lambda n: torch.zeros(n), "not a Tensor"),
    "logprobs": (lambda n: Selection([1] * n, logprobs=[{}]), "logprobs must have one entry a row"),
    "a logprob": (lambda n: Selection([1] * n, logprobs=[3.0] * n), "must be a dict"),
    "errors": (lambda n: Selection([1] * n, errors={7: "what"}), "errors speak of row 7; there are rows 0 to 1"),
    "verdict": (lambda n: Selection([1] * n, finished={0: "enough"}), "must be a FinishReason, and not 'enough'"),
    "verdicts": (lambda n: Selection([1] * n, finished={-1: FinishReason.STOP}), "finished speak of row -1"),
    "parents": (lambda n: Selection([1] * n, parents=[0]), "parents must have one entry a row"),
    "a parent": (lambda n: Selection([1] * n, parents=[0, 9]), "row 1 can't go on from row 9"),
    "half held": (lambda n: Selection([1] + [None] * (n - 1)), "gets all of its tokens at once, or none"),
}


@pytest.mark.parametrize("case", MALFORMED, ids=str)
def test_a_selector_that_answers_what_cant_be_ends_its_own_group(case: str) -> None:
    answer, told = MALFORMED[case]
    engine = make_engine()
    selector = SimpleNamespace(select=lambda logits, requests: answer(len(requests)))
    engine.add_group("bad", [PROMPT, [1]], greedy(9), selector=selector)
    assert_only_bad_failed(engine, "choosing the next token failed", told)


def test_integers_of_any_kind_are_token_ids() -> None:
    engine = make_engine()
    selector = SimpleNamespace(select=lambda logits, requests: Selection(logits.argmax(-1).numpy()))
    engine.add_request("a", PROMPT, greedy(9), selector=selector)
    row = run(engine)["a"].request
    assert row.output_token_ids == TinyModel().generate(PROMPT, 9)
    assert {type(token) for token in row.tokens} == {int}


def test_a_selector_of_two_groups_cant_mix_them() -> None:
    class Mixing:
        def select(self, logits: Any, requests: Any) -> Selection:
            return Selection(logits.argmax(-1).tolist(), parents=list(reversed(range(len(requests)))))

    engine, mixing = make_engine(), Mixing()
    engine.add_group("bad", [PROMPT], greedy(4), selector=mixing)
    engine.add_group("other", [[5, 6]], greedy(4), selector=mixing)
    assert_only_bad_failed(engine, "row 0 can't go on from row 1")


@pytest.mark.parametrize("way", ["raises", "too few"])
def test_a_sampler_that_cant_tell_a_prompts_logprobs_ends_that_request(way: str) -> None:
    class Mute(Sampler):
        def prompt_logprobs(self, logits: Any, next_ids: Any, num: int) -> Any:
            if way == "raises":
                raise MyOwn("no words")
            return super().prompt_logprobs(logits, next_ids, num)[1:]

    engine = make_engine(plugins=[SimpleNamespace(create_sampler=hookimpl(lambda spec: Mute()))])
    engine.add_request("bad", PROMPT, greedy(9, prompt_logprobs=1))
    assert_only_bad_failed(engine, "the logprobs of its prompt could not be told")


def test_a_sampler_that_leaves_a_token_for_later_ends_the_row_instead_of_holding_it_for_ever() -> None:
    class Later(Sampler):
        def select(self, logits: Any, requests: Any) -> Selection:
            answer = super().select(logits, requests)
            return answer._replace(
                token_ids=[
                    None if request.id == "bad" else token
                    for request, token in zip(requests, answer.token_ids, strict=True)
                ]
            )

    engine = make_engine(plugins=[SimpleNamespace(create_sampler=hookimpl(lambda spec: Later()))])
    engine.add_request("bad", PROMPT, greedy(9))
    assert_only_bad_failed(engine, "the engine's sampler chose no token")


def test_tokens_and_parents_that_cant_be_resumed_are_refused_and_change_nothing() -> None:
    engine = make_engine()
    hold = SimpleNamespace(select=lambda logits, requests: Selection([None] * len(requests)))
    rows = engine.add_group("held", [PROMPT, PROMPT], greedy(9), selector=hold)
    other = engine.add_group("other", [[1, 2]], greedy(9), selector=hold)
    engine.step()
    for given, tokens, parents in (
        (rows, [1, 2], [0]),
        (rows, [1, 2], [0, -1]),
        (rows, [1, 2], [0, 2]),
        (rows, [1, 2.0], None),
        ([*rows, *other], [1, 2, 3], [0, 2, 2]),
        ([rows[0], rows[0]], [1, 2], None),
        ([rows[0]], [1], None),
    ):
        with pytest.raises(InvalidRequestError):
            engine.resume(given, tokens, parents)
        engine.check()
        assert [row.tokens for row in (*rows, *other)] == [PROMPT, PROMPT, [1, 2]]
    engine.resume(rows, [4, 5], [0, 0])
    assert [row.tokens for row in rows] == [[*PROMPT, 4], [*PROMPT, 5]]

"""Objects of the caller's: processors, criteria, streamers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from generate_parity import (
    ENDS,
    FULL,
    SHORT,
    EndsAtTurns,
    Options,
    Recorder,
    RecordingStreamer,
    answer,
    assert_alike,
    assert_same,
    some_rows,
)

# ---- objects of the caller's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize(
    "mode",
    [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_processors_and_criteria_with_a_memory_see_what_stock_shows_them(
    patched: Any, rows: Options, mode: Options, ends: Any
) -> None:
    def fresh() -> Options:
        return {"logits_processor": [Recorder()], "stopping_criteria": [EndsAtTurns()]}

    loop = "_beam_search" if "num_beams" in mode else "_sample"
    options = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": ends, **rows, **mode}
    got = assert_same(patched, **options, fresh=fresh, tier="native", loop=loop)
    assert got.seen
    assert_same(patched, **options, **FULL, fresh=fresh, tier="native", loop=loop)


def test_a_processor_alone_and_a_criterion_alone(patched: Any, rows: Options) -> None:
    options = {"eos_token_id": ENDS, "max_new_tokens": 10, "pad_token_id": 0, **rows}
    assert_same(patched, **options, fresh=lambda: {"logits_processor": [Recorder()]}, tier="native", loop="_sample")
    assert_same(patched, **options, fresh=lambda: {"stopping_criteria": [EndsAtTurns()]}, tier="native", loop="_sample")


def test_a_criterion_that_says_one_word_for_all_rows(patched: Any, rows: Options) -> None:
    def third_step(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 29)

    assert_same(patched, **rows, **SHORT, stopping_criteria=[third_step], tier="native", loop="_sample")


def test_a_processor_of_a_type_that_stock_has_takes_its_place(patched: Any, rows: Options) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    own = [RepetitionPenaltyLogitsProcessor(3.0)]
    options = {"repetition_penalty": 1.1, **rows, **SHORT}
    assert_same(patched, **options, logits_processor=own, tier="native", loop="_sample")


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("length", [27, 31, 40])
def test_lengths_and_ends_that_criteria_of_the_callers_bring(
    patched: Any, rows: Options, length: int, mode: Options
) -> None:
    options: Options = {**rows, **mode, "pad_token_id": 0}
    assert_same(patched, **options, stopping_criteria=[MaxLengthCriteria(length)], tier="native")
    assert_same(patched, **options, stopping_criteria=[EosTokenCriteria(ENDS)], max_length=length, tier="native")
    if length == 40:  # beyond max_length, where stock's beams end in an IndexError
        mode = {"tier": None} if "num_beams" in mode else {"tier": "native"}
    else:
        mode = {"tier": "native"}
    assert_same(patched, **options, stopping_criteria=[MaxLengthCriteria(length)], max_length=33, **mode)


def test_ends_without_a_token_to_pad_with_are_refused_as_stock_refuses_them(own: Any, rows: Options) -> None:
    own.generation_config.pad_token_id = None
    own.config.pad_token_id, before = None, own.config.pad_token_id
    try:
        assert_same(own.generate, **rows, stopping_criteria=[EosTokenCriteria(ENDS)], tier=None)
    finally:
        own.config.pad_token_id = before


def test_what_a_processor_raises_reaches_the_caller_and_the_next_call_is_right(patched: Any, rows: Options) -> None:
    class Broken(Recorder):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if len(self.seen) == 3:
                raise ArithmeticError("the fourth is too many")
            return super().__call__(input_ids, scores)

    def fresh() -> Options:
        return {"logits_processor": [Broken()]}

    forms: list[Options] = [{}, {"num_beams": 2}]
    for form in forms:
        options = {**rows, **SHORT, **form}
        got = answer(patched, (), options | fresh())
        expected = answer(patched.stock, (), options | fresh())
        assert repr(got.error) == repr(expected.error) == "ArithmeticError('the fourth is too many')"
        assert_alike(got.seen, expected.seen, "seen")
        assert_same(patched, **options, tier="native")


def test_stop_strings(patched: Any, rows: Options, tokenizer: Any) -> None:
    first = patched.stock(**rows, **SHORT)[:, -7:]
    stops = [tokenizer.decode(first[0, 2:4]), tokenizer.decode(first[2, 4])]
    options = {"stop_strings": stops, "tokenizer": tokenizer, **rows, **SHORT}
    assert_same(patched, **options, eos_token_id=ENDS, tier="native", loop="_sample")
    assert_same(patched, **options, num_beams=2, tier="native", loop="_beam_search")
    assert_same(patched, **options, do_sample=True, **FULL, seed=1, tier="native", loop="_sample")
    assert_same(patched, **rows, **SHORT, stop_strings="a", tier=None)


def test_max_time(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, **SHORT, max_time=1e-9, tier="native", loop="_sample")
    assert_same(patched, **rows, **SHORT, max_time=1e-9, num_beams=2, tier="native", loop="_beam_search")
    assert_same(patched, **rows, **SHORT, max_time=1000.0, tier="native", loop="_sample")


# ---- streamers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_streamer_is_shown_what_stock_shows_it(patched: Any, batch_size: int, do_sample: bool, ends: Any) -> None:
    ids, mask = some_rows((9, 4, 14)[:batch_size])
    options = {"attention_mask": mask, "do_sample": do_sample, "eos_token_id": ends, "pad_token_id": 0}
    loop = "free" if batch_size == 1 and not do_sample else "_sample"
    for seed in range(3):
        got = assert_same(
            patched,
            ids,
            **options,
            max_new_tokens=9,
            fresh=lambda: {"streamer": RecordingStreamer()},
            seed=seed,
            tier="native",
            loop=loop,
        )
        assert got.seen[-1] == ("end",)


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_streamers(patched: Any, tokenizer: Any, capsys: Any, do_sample: bool) -> None:
    ids, mask = some_rows((9,))
    options = {"attention_mask": mask, "do_sample": do_sample, "max_new_tokens": 12, "pad_token_id": 0}

    def texts(generate: Any) -> list[Any]:
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
        answer(generate, (ids,), {**options, "streamer": TextStreamer(tokenizer)})
        answer(generate, (ids,), {**options, "streamer": pieces})
        return [capsys.readouterr().out, list(pieces), asyncio.run(later(generate))]

    async def later(generate: Any) -> list[str]:
        pieces = AsyncTextIteratorStreamer(tokenizer)
        torch.manual_seed(0)
        call = asyncio.to_thread(generate, ids, **options, streamer=pieces)
        _, found = await asyncio.gather(call, collect(pieces))
        return found

    async def collect(pieces: Any) -> list[str]:
        return [piece async for piece in pieces]

    got = texts(patched)
    assert patched.last_report().tier == "native"
    assert got == texts(patched.stock)
    assert len(got[0]) > 12


def test_beams_and_a_streamer_are_refused_as_stock_refuses_them(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, num_beams=2, streamer=RecordingStreamer(), tier=None)

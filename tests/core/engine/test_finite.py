"""K/V that aren't numbers stay with the request they were computed for: nobody finds them in the prefix cache."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from paged_core import Engine, Greedy, SamplingParams, Selection
from tiny_engine import tiny_engine
from tiny_model import TinyModel

make_engine = partial(tiny_engine, num_blocks=100, max_num_batched_tokens=16)

PROMPT = [(7 * i) % 90 for i in range(41)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Flaky(TinyModel):
    """Its ``forward`` number ``at`` computes NaN for one token, the one that is the ``spot``-th of the step."""

    def __init__(self, at: int, spot: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.at, self.spot = at, spot
        self.num_calls = 0

    def forward(self, token_ids: Any, positions: Any, attend: Any, sample_indices: Any) -> Any:
        self.num_calls += 1
        if self.num_calls != self.at:
            return super().forward(token_ids, positions, attend, sample_indices)
        embed, self.embed = self.embed, self.embed.clone()
        self.embed[token_ids[min(self.spot, len(token_ids) - 1)]] = math.nan
        try:
            return super().forward(token_ids, positions, attend, sample_indices)
        finally:
            self.embed = embed


def run(engine: Engine) -> dict[str, list[Any]]:
    ends: dict[str, list[Any]] = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                ends.setdefault(output.request.id, []).append(output)
        engine.check()
    return ends


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"params": GREEDY},
    "samples": {"params": SamplingParams(n=3, temperature=0, max_tokens=6, ignore_eos=True)},
    "beams": {"params": SamplingParams(n=3, use_beam_search=True, max_tokens=6)},
    "likeliest": {"params": GREEDY, "selector": Greedy()},
}


@pytest.mark.parametrize("window", [None, 6], ids=["full", "windowed"])
@pytest.mark.parametrize("lookahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_who_comes_after_a_nan_gets_what_the_model_says(way: str, at: int, lookahead: bool, window: int | None) -> None:
    model = Flaky(at, spot=3 if window is None else 15, window=window)
    engine = make_engine(model, lookahead=lookahead)
    engine.add_request("first", PROMPT, **WAYS[way])
    run(engine)
    assert model.num_calls >= at
    engine.add_request("second", PROMPT, GREEDY)
    (end,) = run(engine)["second"]
    truth = TinyModel(window=window).generate(PROMPT, 6)
    assert end.error is None
    assert end.request.output_token_ids == truth
    whole = engine.add_request("third", PROMPT, GREEDY)[0]
    run(engine)
    assert whole.num_cached == 40, "what was computed anew is found again"


def test_who_waits_for_a_prefix_that_turns_out_to_be_nan_computes_it() -> None:
    engine = make_engine(Flaky(2))
    for name in ("owner", "waits", "waits too"):
        engine.add_request(name, PROMPT, GREEDY)
    ends = run(engine)
    assert "NaN" in ends["owner"][0].error
    for name in ("waits", "waits too"):
        assert ends[name][0].request.output_token_ids == TinyModel().generate(PROMPT, 6)


def test_a_group_whose_tokens_are_chosen_outside_leaves_no_nan_behind() -> None:
    class Outside:
        def select(self, logits: Any, requests: Any) -> Selection:
            return Selection([None] * len(requests))

    engine = make_engine(Flaky(3))
    rows = engine.add_group("outside", [PROMPT, PROMPT], GREEDY, selector=Outside())
    while engine.has_work:
        engine.step()
    assert all(row.held for row in rows)
    engine.add_request("second", PROMPT, GREEDY)
    (end,) = run(engine)["second"]
    assert end.request.output_token_ids == TinyModel().generate(PROMPT, 6)


def test_a_request_whose_own_tokens_make_nan_costs_others_no_more_than_computing_a_prefix_again() -> None:
    class Poisoned(TinyModel):
        def forward(self, token_ids: Any, *rest: Any) -> Any:
            embed, self.embed = self.embed, self.embed.clone()
            self.embed[95] = math.nan
            try:
                return super().forward(token_ids, *rest)
            finally:
                self.embed = embed

    engine = make_engine(Poisoned())
    engine.add_request("good", PROMPT, GREEDY)
    running = run(engine)["good"][0].request
    engine.add_request("long", PROMPT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    engine.step()
    engine.add_request("bad", [*PROMPT[:32], 95, 1, 2], GREEDY)
    engine.add_request("good", PROMPT, GREEDY)
    ends = run(engine)
    assert "NaN" in ends["bad"][0].error
    assert ends["good"][0].request.output_token_ids == running.output_token_ids
    assert ends["long"][0].request.output_token_ids == TinyModel().generate(PROMPT, 40)


def test_a_prefix_is_found_as_soon_as_the_chunk_that_computes_it_has_ended() -> None:
    engine = make_engine(TinyModel())
    long = engine.add_request("long", [*PROMPT, *PROMPT, *PROMPT], GREEDY)[0]
    engine.step()
    assert long.num_computed == 16
    engine.abort("long")
    late = engine.add_request("late", [*PROMPT[:16], 80, 81, 82], GREEDY)[0]
    engine.step()
    assert late.num_cached == 16
    run(engine)
    assert late.output_token_ids == TinyModel().generate([*PROMPT[:16], 80, 81, 82], 6)


def test_logits_that_forbid_tokens_are_numbers() -> None:
    class Masked(TinyModel):
        def forward(self, *args: Any) -> Any:
            logits = super().forward(*args)
            logits[:, ::2] = -math.inf
            return logits

    engine = make_engine(Masked())
    for name, cached in (("first", 0), ("second", 40)):
        row = engine.add_request(name, PROMPT, GREEDY)[0]
        run(engine)
        assert row.num_cached == cached

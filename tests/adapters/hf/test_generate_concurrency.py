"""Many threads call a patched model at once: each gets its own answer, its own errors, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from torch import Tensor

from concurrent_calls import (
    GREEDY,
    KINDS,
    SINGLE,
    SMALL,
    host_of,
    one_of_each,
    prompt,
    step_when_all_are_there,
    together,
    used_blocks,
)
from paged_hf import paged_generate
from rounded_parity import HALVES, Rounded

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_fifty_threads_with_calls_of_all_kinds_get_what_each_gets_alone(model: Any) -> None:
    calls = [one_of_each(model, number) for number in range(50)]
    answers = together([call for _, call, _ in calls])
    for (kind, _, expected), answer in zip(calls, answers, strict=True):
        assert not isinstance(answer, BaseException), (kind, answer)
        assert answer[0] == expected, kind
        assert answer[1].tier == KINDS[kind][1], (kind, answer[1])
    assert used_blocks(model) == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_threads_whose_model_has_16_bits_get_stocks_answers_up_to_near_ties(dtype: str, tiny: Any) -> None:
    model = tiny("llama", **SMALL).to(HALVES[dtype])
    model.generate = paged_generate(model, check=False)
    calls, judges = [], []
    for number, kind in enumerate(["greedy", "greedy batch", "penalty", "processor", "streamer", "prefix"] * 2):
        fresh, _ = KINDS[kind]
        given = {**prompt(number, rows=1 if kind in SINGLE else 3), "max_new_tokens": 8, "pad_token_id": 0}
        judges.append(Rounded.of(model.generate.stock, **given, fresh=fresh))
        calls.append(lambda given=given, fresh=fresh: model.generate(**given, **fresh()))
    for judge, answer in zip(judges, together(calls), strict=True):
        judge.assert_sequences(answer)
    assert sum(judge.compared for judge in judges) >= 40
    assert used_blocks(model) == 0


def test_asyncio_callers_get_what_each_gets_alone(model: Any) -> None:
    calls = [one_of_each(model, number) for number in range(24)]

    async def main() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(call) for _, call, _ in calls))

    answers = asyncio.run(main())
    assert [answer for answer, _ in answers] == [expected for _, _, expected in calls]
    assert [report.tier for _, report in answers] == [KINDS[kind][1] for kind, _, _ in calls]


def test_rows_of_all_callers_run_in_one_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_hf.generate.host._PATIENCE", 1e9)  # a busy machine keeps callers from choosing in time
    sampled = step_when_all_are_there(host_of(model), 16, monkeypatch)
    free = [lambda seed=seed: model.generate(**prompt(seed), **GREEDY) for seed in range(8)]
    beams = [lambda seed=seed: model.generate(**prompt(seed), **GREEDY, num_beams=2) for seed in range(8)]
    answers = together([*free, *beams])
    assert all(isinstance(answer, Tensor) for answer in answers), answers
    assert max(sampled) == 8 + 8 * 2
    assert len(sampled) < 3 * 12, "they took turns"


def test_each_thread_reads_the_report_of_its_own_call(model: Any) -> None:
    assert together([lambda: paged_generate.last_report()]) == [None]  # type: ignore[attr-defined]
    kinds = [{"num_beams": 2}, {}, {"prompt_lookup_num_tokens": 2, "eos_token_id": 95}, {"output_attentions": True}]
    dicts = {"return_dict_in_generate": True}
    barrier = threading.Barrier(4)

    def call(options: dict[str, Any]) -> Any:
        model.generate(**prompt(1), **GREEDY, **options, **dicts)
        barrier.wait(60)
        return model.generate.last_report()

    reports = together([lambda options=options: call(options) for options in kinds])
    assert [(report.tier, report.loop) for report in reports] == [
        ("native", "_beam_search"),
        ("native", "_sample"),
        ("cache", "_assisted_decoding"),
        ("stock", "_sample"),
    ]

"""Many threads call a patched model at once: each gets its own answer, its own errors, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from paged_hf import paged_generate
from paged_hf.generate import report
from rounded_parity import HALVES, Rounded

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
BLOCK_BYTES = 2 * 2 * 2 * 8 * 8 * 4  # layers, K and V, heads, slots, head dim, bytes
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture
def model(tiny: Any) -> Any:
    model = tiny("llama", **SMALL)
    model.generate = paged_generate(model, check=False)
    return model


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def host_of(model: Any) -> Any:
    return model.generate.tiers.host


def used_blocks(model: Any) -> int:
    engine = host_of(model).engine
    return engine.memory.num_blocks_used if engine is not None else 0


def prompt(seed: int, rows: int = 1) -> dict[str, Tensor]:
    """Random ids; in a batch each row has another length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, 4 + seed % 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, or raise, each in a thread of its own."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        ready.wait(60)
        try:
            return call()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(run, call) for call in calls]]


class Counting(LogitsProcessor):
    """Has state, and looks at all that a processor is shown."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        scores = scores.clone()
        scores[:, (input_ids.sum().item() + self.num_calls) % scores.shape[1]] -= 20
        return scores


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


# each: options of a call, made anew for it; the tier it takes
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "greedy": (lambda: {"do_sample": False}, "native"),
    "greedy batch": (lambda: {"do_sample": False, "eos_token_id": [5, 17, 40]}, "native"),
    "sampling": (lambda: {"do_sample": True, "top_k": 1, "temperature": 0.7}, "native"),
    "samples": (lambda: {"do_sample": True, "top_k": 1, "num_return_sequences": 3}, "native"),
    "beams": (lambda: {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}, "native"),
    "penalty": (lambda: {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, "native"),
    "processor": (lambda: {"do_sample": False, "logits_processor": LogitsProcessorList([Counting()])}, "native"),
    "criterion": (lambda: {"do_sample": False, "stopping_criteria": StoppingCriteriaList([_short])}, "native"),
    "streamer": (lambda: {"do_sample": False, "streamer": Collecting()}, "native"),
    "prefix": (
        lambda: {"do_sample": False, "prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 90, 5 + row]},
        "native",
    ),
    "lookup": (lambda: {"do_sample": False, "prompt_lookup_num_tokens": 2, "eos_token_id": 95}, "cache"),
    "attentions": (
        lambda: {"do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True},
        "stock",
    ),
}
SINGLE = ("greedy", "streamer", "lookup")


def _short(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return torch.full((len(input_ids),), bool(input_ids[0, -1] % 7 == 3))


def tokens(result: Any) -> list[list[int]]:
    return (result if isinstance(result, Tensor) else result.sequences).tolist()


def one_of_each(model: Any, number: int) -> tuple[str, Callable[[], tuple[list[list[int]], Any]], list[list[int]]]:
    """The call ``number``: its kind, the call itself (its tokens, its report), and stock's tokens."""
    kind = list(KINDS)[number % len(KINDS)]
    options, _ = KINDS[kind]
    given = {**prompt(number, rows=1 if kind in SINGLE else 1 + number % 3), "max_new_tokens": 8 + number % 7}
    expected = tokens(model.generate.stock(**given, **options()))

    def call() -> tuple[list[list[int]], Any]:
        result = model.generate(**given, **options())
        return tokens(result), model.generate.last_report()

    return kind, call, expected


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


def step_when_all_are_there(host: Any, num_calls: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first step waits for so many calls. Returns how many rows each step samples."""
    step, sampled = host.step, []

    def when_all_are_there() -> bool:
        if not sampled and host.num_open < num_calls:
            time.sleep(0.001)
            return True  # look for more calls
        worked = step()
        sampled.append(host.engine.last_stats.num_sampled)
        return worked

    monkeypatch.setattr(host, "step", when_all_are_there)
    return sampled


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


# ---- errors belong to their caller -------------------------------------------------------------------------------


class Trouble(Exception):
    pass


class Raising(BaseStreamer):
    """Raises ``error`` when it is called for the third time, whatever it is used as."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.put(input_ids)
        return scores

    def put(self, value: Any) -> None:
        self.num_calls += 1
        if self.num_calls == 3:
            raise self.error

    def end(self) -> None:
        pass

    def criterion(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def prefix(self, row: int, ids: Tensor) -> list[int]:
        self.put(ids)
        return [7, 8]


PLACES: dict[str, Callable[[Raising], dict[str, Any]]] = {
    "processor": lambda raising: {"logits_processor": LogitsProcessorList([raising])},
    "criterion": lambda raising: {"stopping_criteria": StoppingCriteriaList([raising.criterion])},
    "prefix": lambda raising: {"prefix_allowed_tokens_fn": raising.prefix},
    "free streamer": lambda raising: {"streamer": raising},
    "lockstep streamer": lambda raising: {"streamer": raising, "repetition_penalty": 1.3},
    "beams": lambda raising: {"logits_processor": LogitsProcessorList([raising]), "num_beams": 3},
}


@pytest.mark.parametrize("error", [Trouble("mine"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
def test_what_a_callers_own_parts_raise_reaches_that_caller_alone(model: Any, error: BaseException) -> None:
    raising = [
        lambda place=place: model.generate(**prompt(3), **GREEDY, **place(Raising(error))) for place in PLACES.values()
    ]
    sound = [one_of_each(model, number) for number in range(8)]
    answers = together([*raising, *(call for _, call, _ in sound)])
    for place, answer in zip(PLACES, answers, strict=False):
        assert answer is error, place
    for (kind, _, expected), answer in zip(sound, answers[len(PLACES) :], strict=True):
        assert answer[0] == expected, kind
        assert answer[1].tier == KINDS[kind][1], kind
    assert used_blocks(model) == 0
    assert model.generate(**prompt(3), **GREEDY).tolist() == model.generate.stock(**prompt(3), **GREEDY).tolist()
    assert model.generate.last_report().tier == "native"


def test_a_caller_that_waits_in_its_own_code_holds_nobody_up(model: Any) -> None:
    others_are_done = threading.Event()
    held = []

    class Waiting(Raising):
        def put(self, value: Any) -> None:
            self.num_calls += 1
            if self.num_calls == 3:
                held.append(others_are_done.wait(60))

    def others() -> Any:
        answers = together([call for _, call, _ in sound])
        others_are_done.set()
        return answers

    sound = [one_of_each(model, number) for number in range(8)]
    calls = [
        lambda place=place: model.generate(**prompt(3), **GREEDY, **place(Waiting(Trouble())))
        for place in PLACES.values()
    ]
    *waited, answers = together([*calls, others])
    assert held == [True] * len(PLACES)
    assert all(isinstance(answer, Tensor) for answer in waited), waited
    assert [answer for answer, _ in answers] == [expected for _, _, expected in sound]


def test_a_model_that_fails_once_fails_the_calls_of_that_step_and_no_later_one(model: Any) -> None:
    options = {"repetition_penalty": 1.3, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate.stock(**prompt(1), **options)
    mlp = model.model.layers[1].mlp
    forward, countdown = mlp.forward, [10]

    def fails(hidden: Tensor) -> Tensor:
        countdown[0] -= 1
        if -20 < countdown[0] <= 0:
            raise RuntimeError("the device has had enough")
        return forward(hidden)

    mlp.forward = fails
    answers = together([lambda: model.generate(**prompt(1), **options) for _ in range(4)])
    del mlp.forward
    assert any(isinstance(answer, Exception) for answer in answers)
    for answer in answers:
        if isinstance(answer, Exception):
            assert "the device has had enough" in str(answer)
        else:
            assert torch.equal(answer, expected)
    assert torch.equal(model.generate(**prompt(1), **options), expected)
    assert model.generate.last_report().tier == "native"
    assert used_blocks(model) == 0


def test_where_no_thread_can_be_started_stock_answers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for options in ({}, {"num_beams": 2}):
            answer = model.generate(**prompt(1), **GREEDY, **options)
            assert "can't start new thread" in str(model.generate.last_report())
            assert torch.equal(answer, model.generate.stock(**prompt(1), **GREEDY, **options))
    model.generate(**prompt(1), **GREEDY)
    assert model.generate.last_report().tier == "native"


# ---- threads -----------------------------------------------------------------------------------------------------


def test_whoever_returns_last_leaves_no_thread_even_if_two_end_at_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(model)
    end, closing = host._end, threading.Barrier(2)
    monkeypatch.setattr(host, "_end", lambda call: (time.sleep(0.05), end(call)))
    left: list[bool] = []

    def call() -> None:
        model.generate(**prompt(1), **GREEDY, streamer=Both())
        left.append(any(thread.name == "paged-generate" for thread in threading.enumerate()))

    class Both(Collecting):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.seen) == 12:
                closing.wait(60)  # before the last token, so that both end in the same moment

    assert together([call, call]) == [None, None]
    assert left[-1] is False


def test_no_thread_is_left_when_a_call_returns_or_raises(model: Any) -> None:
    before = threading.enumerate()
    for options in ({}, {"num_beams": 2}, {"streamer": Collecting()}):
        model.generate(**prompt(1), **GREEDY, **options)
        assert threading.enumerate() == before
    for place in PLACES.values():
        with pytest.raises(Trouble):
            model.generate(**prompt(1), **GREEDY, **place(Raising(Trouble())))
        assert threading.enumerate() == before


def test_two_hundred_calls_leave_no_more_threads_in_the_system(model: Any) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    model.generate(**prompt(1), max_new_tokens=2, do_sample=False)
    before = count()
    for seed in range(200):
        model.generate(**prompt(seed), max_new_tokens=1 + seed % 2, num_beams=1 + seed % 3 // 2, do_sample=False)
    assert model.generate.last_report().tier == "native"
    assert count() <= before + 2  # the system may see the last one off a moment later than Python


# ---- too little memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_preempt_and_wait_for_one_another_all_end_with_the_right_tokens(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model = tiny("llama", **SMALL)
    model.generate = paged_generate(model, kv_cache_memory=(14 + 3 * seed) * BLOCK_BYTES, check=False)
    step_when_all_are_there(host_of(model), 14, monkeypatch)
    draw = random.Random(seed)
    calls, expected = [], []
    for number in range(14):
        rows = draw.randint(1, 3)
        given = {**prompt(draw.randrange(99), rows), "max_new_tokens": draw.randint(6, 30), "do_sample": False}
        given |= draw.choice([{}, {}, {"repetition_penalty": 1.2}, {"num_beams": 2} if rows == 1 else {}])
        if rows == 1 and number % 3 == 0:
            given["streamer"] = None if "num_beams" in given else Collecting()
        expected.append(tokens(model.generate.stock(**given)))

        def call(given: dict[str, Any] = given) -> Any:
            return tokens(model.generate(**given)), model.generate.last_report()

        calls.append(call)
    answers = together(calls)
    assert [answer[0] for answer in answers] == expected
    assert {answer[1].tier for answer in answers} == {"native"}
    engine = host_of(model).engine
    assert engine.last_stats.total_preemptions > 0
    assert engine.memory.num_blocks_used == 0
    engine.check()


@pytest.mark.parametrize("kv_cache_memory", [5 * BLOCK_BYTES, 10])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["free", "lockstep"])
def test_a_call_larger_than_the_budget_goes_to_stock_with_a_warning_or_raises(
    tiny: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kv_cache_memory: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(report, "_warned", set())
    model = tiny("llama", **SMALL)
    given = {**prompt(1), "max_new_tokens": 60, "do_sample": False, **options}
    patched = paged_generate(model, kv_cache_memory=kv_cache_memory, check=False)
    answer = patched(**given)
    assert patched.last_report().tier == "stock"
    assert patched.last_report().reason in caplog.text
    assert torch.equal(answer, patched.stock(**given))
    strict = paged_generate(model, kv_cache_memory=kv_cache_memory, over_budget="raise", check=False)
    with pytest.raises(ValueError, match="block"):
        strict(**given)
    if kv_cache_memory > BLOCK_BYTES:
        strict(**prompt(2), max_new_tokens=3, do_sample=False)
        assert strict.last_report().tier == "native"
    assert strict.tiers.host.engine is None or strict.tiers.host.engine.memory.num_blocks_used == 0


# ---- processes ---------------------------------------------------------------------------------------------------

SCENARIOS = (
    "interrupt_a_free_call",
    "interrupt_a_lockstep_call",
    "fork_before_between_and_during_calls",
    "multiprocessing_by_fork",
    "fork_in_a_callers_own_processor",
    "fork_in_a_callers_own_streamer",
    "exit_while_daemon_threads_call",
    "exit_handlers_may_call_and_wait_for_callers",
)


@pytest.fixture(scope="module")
def scenarios() -> Any:
    """Exit status, output and errors of each scenario, run in a process of its own."""
    script = Path(__file__).with_name("generate_scenarios.py")
    command = [sys.executable, "-W", "ignore", script, *SCENARIOS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_a_process_of_its_own(scenarios: Any, name: str) -> None:
    status, output, errors = scenarios[name]
    assert (status, errors, output) == (0, "", "well\n")

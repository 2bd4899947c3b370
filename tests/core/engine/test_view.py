"""What people who watch an engine see: who runs and waits, and what every block is."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from alphabet_model import AlphabetModel, Gate
from paged_core import AsyncEngine, Engine, EngineConfig, EngineDeadError, EngineView, SamplingParams
from toy_tokenizers import CharacterTokenizer
from waiting import until

CONFIG = EngineConfig(num_blocks=64, block_size=4, attention_backend="reference")
PROMPT = list(range(1, 14))  # three full blocks and a token
LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LIMIT_S = 30.0


def totals(view: EngineView) -> tuple[int, int, int]:
    cells = view.cells(1000)
    return sum(cells.cached), sum(cells.used), sum(cells.shared)


def test_a_view_tells_who_runs_who_waits_and_what_every_block_is() -> None:
    engine = Engine(AlphabetModel(), CONFIG)
    assert totals(engine.view()) == (0, 0, 0)
    engine.add_request("a", PROMPT, LONG)
    assert (engine.view().num_running, engine.view().num_waiting) == (0, 1)
    engine.step()
    assert (engine.view().num_running, engine.view().num_waiting) == (1, 0)
    assert totals(engine.view()) == (0, 4, 0)
    engine.add_request("b", PROMPT, LONG)
    engine.step()
    assert totals(engine.view()) == (0, 2, 3), "both have the full blocks of the prompt in common"
    engine.abort("a")
    assert totals(engine.view()) == (0, 4, 0)
    engine.abort("b")
    assert totals(engine.view()) == (3, 0, 0), "the prompt's blocks can be found again"
    assert (engine.view().num_running, engine.view().num_waiting) == (0, 0)


def test_a_view_does_not_change_when_the_engine_goes_on() -> None:
    engine = Engine(AlphabetModel(), CONFIG)
    engine.add_request("a", PROMPT, LONG)
    engine.step()
    view = engine.view()
    engine.abort("a")
    assert totals(view) == (0, 4, 0)


def test_a_block_map_in_one_cell_a_block_names_each_block() -> None:
    cells = EngineView(0, 0, 16, [1, 0, 3, 0, 2], [4]).cells(5)
    assert cells == (5, 1, [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 1])


def test_a_large_pool_is_told_in_few_cells_that_hold_every_block() -> None:
    references = [0] * 100_003
    references[:10] = [1] * 10
    references[-1] = 2
    cells = EngineView(0, 0, 16, references, list(range(11, 21))).cells(2048)
    assert cells.num_blocks == 100_003
    assert len(cells.used) == len(cells.cached) == len(cells.shared) <= 2048
    assert cells.blocks_per_cell * (len(cells.used) - 1) < 100_003 <= cells.blocks_per_cell * len(cells.used)
    assert (sum(cells.cached), sum(cells.used), sum(cells.shared)) == (10, 10, 1)
    assert (cells.used[0], cells.cached[0], cells.shared[-1]) == (10, 10, 1)


# ---- through an AsyncEngine ----------------------------------------------------------------------------------------


def test_one_who_looks_is_answered_by_the_stepping_thread_before_and_while_requests_run() -> None:
    gate = Gate()
    with AsyncEngine(AlphabetModel(gate), tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        assert engine.look(Engine.view).result(LIMIT_S).num_running == 0
        stream = engine.submit(PROMPT, LONG)
        until(lambda: gate.num_steps > 0)
        seen = engine.look(Engine.view)
        gate.open()
        assert seen.result(LIMIT_S).num_running == 1
        assert engine.look(lambda _: threading.current_thread().name).result(LIMIT_S) == "paged-engine"
        assert stream.result(LIMIT_S).finished


def test_what_a_look_raises_is_its_callers_alone() -> None:
    with AsyncEngine(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.look(lambda _: 1 / 0).result(LIMIT_S)
        assert engine.submit(PROMPT, LONG).result(LIMIT_S).finished


def test_a_look_that_nobody_wants_any_more_is_not_taken() -> None:
    gate = Gate()
    with AsyncEngine(AlphabetModel(gate), tokenizer=CharacterTokenizer(), config=CONFIG) as engine:
        stream = engine.submit(PROMPT, LONG)
        until(lambda: gate.num_steps > 0)
        looked: list[object] = []
        answer = engine.look(looked.append)
        assert answer.cancel()
        gate.open()
        assert stream.result(LIMIT_S).finished
        with pytest.raises(CancelledError):
            answer.result(LIMIT_S)
    assert looked == []


def test_a_look_at_a_closed_or_failed_engine_is_told_so() -> None:
    gate = Gate()

    def fail(token_ids: list[int]) -> None:
        gate(token_ids)
        raise EngineDeadError("the worst")  # which no step survives

    engine = AsyncEngine(AlphabetModel(fail), tokenizer=CharacterTokenizer(), config=CONFIG)
    stream = engine.submit(PROMPT, LONG)
    until(lambda: gate.num_steps > 0)
    queued = engine.look(Engine.view)
    gate.open()
    for late in (stream, queued):
        with pytest.raises(EngineDeadError):
            late.result(LIMIT_S)
    with pytest.raises(EngineDeadError):
        engine.look(Engine.view)
    closed = AsyncEngine(AlphabetModel(), tokenizer=CharacterTokenizer(), config=CONFIG)
    closed.close()
    with pytest.raises(EngineDeadError):
        closed.look(Engine.view)

"""A server that is killed while it streams, and one beside whose client others mean harm: what they see."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

from places import ROOT
from tiny_folder import save


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_reliability")


def test_clients_of_a_killed_server_see_an_error_and_never_a_shorter_answer(bench: Any, tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    told = bench.measure_kill(argparse.Namespace(model=str(model), clients=4))
    assert set(told["ends"]) <= {"IncompleteRead", "ConnectionResetError"}
    assert told["events_before"] > 0
    assert told["its_stream_ends_with"] == "[DONE]"


def test_a_neighbour_of_a_flood_and_of_bombs_is_told_all_and_they_are_refused(bench: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(rounds=1, tokens=20)
    with bench.serving(str(save(tmp_path / "model")), options=["--max-queue", "1"]) as (_, port):
        for trouble, how_much, outcomes in (
            (bench.flood, 4, {"left at once", "left after an event", "refused: 503"}),
            (bench.bombs, 4.0, {"400"}),
        ):
            told = bench.neighbour(args, port, trouble, how_much)
            assert told["of_the_others"].keys() <= outcomes
            assert told["of_the_others"]
            for felt in (told["alone"], told["beside"]):
                assert (felt["ends"], felt["tokens"]) == ({"[DONE]": 1}, 20)

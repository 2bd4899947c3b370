"""The simulator is the scheduler at work: what it says of small cases can be worked out by hand."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tracemalloc

import pytest

import tiny_folder
from paged_core import ConfigError
from paged_simulation.costs import CardCosts, LinearCosts, StepSize, fit
from paged_simulation.fleet import Fleet, simulate
from paged_simulation.histogram import Histogram
from paged_simulation.replica import Sizes
from paged_simulation.report import figures
from paged_simulation.traffic import Arrival, Trace, Traffic
from places import ROOT

A_SECOND_A_STEP = LinearCosts(1.0, 0.0, 0.0, 0.0)
SIZES = Sizes(num_blocks=200, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, watermark=0.0)


def told(arrivals, fleet=None, costs=A_SECOND_A_STEP):
    return figures(simulate(iter(arrivals), fleet or Fleet(SIZES), costs))


def test_one_request_takes_a_step_a_token():
    found = told([Arrival(5.0, [1] * 10, 4)])
    assert found["span_s"] == pytest.approx(4.0)
    assert found["first_token_s"]["mean"] == pytest.approx(1.0)
    assert found["between_tokens_s"]["mean"] == pytest.approx(1.0)
    assert found["whole_s"]["mean"] == pytest.approx(4.0)
    assert (found["output_tokens"], found["prompt_tokens"], found["steps"]) == (4, 10, 4)


def test_who_comes_during_a_step_waits_for_its_end_and_a_long_prompt_takes_several_steps():
    found = told([Arrival(0.0, [1] * 8, 3), Arrival(0.5, [2] * 100, 1)])
    # steps end at 1 (8 tokens), 2 (one token and 63), 3 (one and 37): the second's first token comes at 3
    assert found["first_token_s"]["mean"] == pytest.approx((1.0 + 2.5) / 2)
    assert found["steps"] == 3


def test_requests_that_are_preempted_are_counted_and_lose_no_token():
    sizes = Sizes(num_blocks=10, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, watermark=0.0)
    found = told([Arrival(0.0, [number] * 6, 20) for number in range(3)], Fleet(sizes))
    assert found["preemptions"] > 0
    assert found["output_tokens"] == 60
    assert found["num_requests"] == 3
    assert found["between_tokens_s"]["mean"] > 1.0, "who was preempted waited for his next token"


def test_what_can_never_fit_is_refused():
    assert told([Arrival(0.0, [1] * 5000, 10), Arrival(0.0, [2], 1)], Fleet(Sizes(8, 4)))["num_refused"] == 1


@pytest.mark.parametrize("routing", ["prefix", "load", "round-robin", "random"])
def test_every_routing_answers_every_request(routing):
    traffic = Traffic(300, 40.0, num_prefixes=6, prefix_tokens=40, max_prompt=60, max_output=30)
    found = told(traffic.arrivals(), Fleet(SIZES, 4, routing), LinearCosts(0.01, 1e-4, 0, 0))
    assert found["num_requests"] == 300


@pytest.mark.parametrize("routing", ["prefix", "load"])
@pytest.mark.parametrize("num_blocks", [60, 400], ids=["too few blocks", "enough"])
@pytest.mark.parametrize("rate", [8.0, 60.0, float("inf")])
def test_foreseen_steps_come_to_what_they_come_to_one_by_one(routing, num_blocks, rate):
    sizes = Sizes(num_blocks, block_size=4, max_num_seqs=6, max_num_batched_tokens=48, watermark=0.02)
    traffic = Traffic(150, rate, num_prefixes=5, prefix_tokens=18, prompt_median=20, max_prompt=60, max_output=40)
    costs = LinearCosts(0.01, 1e-4, 3e-4, 1e-6)
    foreseen, stepped = (
        simulate(traffic.arrivals(), Fleet(sizes, 3, routing, report_s=0.2, leaps=leaps), costs)
        for leaps in (True, False)
    )
    assert bins(foreseen) == bins(stepped), "the same moments"
    assert figures(foreseen) == Almost(figures(stepped)), "the same in all else"


def bins(outcome):
    record = outcome.record
    return [each.counts() for each in (record.first_token, record.between_tokens, record.whole)]


class Almost:
    """Figures that differ by the order in which they were summed up."""

    def __init__(self, figures):
        self._figures = figures

    def __eq__(self, other):
        return all(
            Almost(mine) == other[name] if isinstance(mine, dict) else pytest.approx(mine, rel=1e-9) == other[name]
            for name, mine in self._figures.items()
        )


def test_prefix_routing_finds_nearly_what_one_replica_finds_and_two_choices_do_not():
    def hit_rate(num_replicas: int, routing: str) -> float:
        traffic = Traffic(700, 6.0, num_prefixes=24, prefix_tokens=240, max_prompt=60, max_output=24)
        sizes = Sizes(num_blocks=2400 // num_replicas, block_size=8, max_num_seqs=32, max_num_batched_tokens=256)
        return told(traffic.arrivals(), Fleet(sizes, num_replicas, routing), LinearCosts(0.02, 1e-3, 0, 0))[
            "prefix_hit_rate"
        ]

    one, four, by_load = hit_rate(1, "prefix"), hit_rate(4, "prefix"), hit_rate(4, "load")
    assert four > one - 0.05
    assert by_load < four - 0.1


def test_eight_times_the_requests_take_at_most_twice_the_memory():
    def peak(num: int) -> int:
        gc.collect()
        tracemalloc.start()
        told(Traffic(num, 50.0, max_prompt=20, max_output=6).arrivals(), Fleet(SIZES), LinearCosts(1e-3, 1e-6, 0, 0))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = (min(peak(num) for _ in range(2)) for num in (150, 1200))  # what waits for the collector counts, too
    assert many < 2 * few


def test_costs_that_made_the_steps_are_found_again():
    made = LinearCosts(0.02, 1e-3, 2e-4, 1e-6, 5e-4, 64)
    sizes = [StepSize(n, r, c) for n in (1, 7, 40, 64, 100, 200) for r in (0, 1, 5) for c in (50, 4000)]
    found = fit([(size, made.step_s(size)) for size in sizes])
    assert [found.step_s(size) for size in sizes] == pytest.approx([made.step_s(size) for size in sizes], rel=1e-6)
    with pytest.raises(ConfigError, match="too few"):
        fit([(StepSize(1, 1, 1), 1.0)])


def test_a_cards_step_is_bound_by_memory_then_by_arithmetic():
    card = CardCosts(weight_bytes=8e9, kv_bytes=1e5, bytes_s=1e12, flops_s=1e14, parameters=4e9)
    assert card.step_s(StepSize(1, 1, 0)) == pytest.approx(8e-3)
    assert card.step_s(StepSize(1000, 1, 0)) == pytest.approx(80e-3)
    assert card.step_s(StepSize(1, 1, 10_000)) == pytest.approx(9e-3)


def test_percentiles_are_right_to_one_per_cent():
    histogram = Histogram()
    for number in range(1, 1001):
        histogram.add(number / 100)
    assert histogram.percentile(0.5) == pytest.approx(5.0, rel=0.011)
    assert histogram.percentile(0.99) == pytest.approx(9.9, rel=0.011)
    assert histogram.mean == pytest.approx(5.005)


def test_a_trace_is_replayed_stretched_and_repeated(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,30,4\n"
                    "2023-11-16 18:17:05.9799600,50,2\n")  # fmt: skip
    arrivals = list(Trace(path, num_requests=3).arrivals())
    assert [len(each.prompt) for each in arrivals] == [30, 50, 30]
    assert [each.at_s for each in arrivals] == pytest.approx([0.0, 2.0, 4.0])
    assert [each.at_s for each in Trace(path, 3, rate=1.0).arrivals()] == pytest.approx([0.0, 1.0, 2.0])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no trace"):
        list(Trace(path).arrivals())


def test_the_command_line_writes_table_json_and_plot(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/simulate.py"), "run", "--requests", "200", "--rate", "20,40",
               "--replicas", "2", "--routing", "prefix,load", "--prefixes", "4", "--output-median", "20",
               "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| output tokens per second |" in done.stdout
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert outcomes.keys() == {f"routing {r} @ {rate}" for r in ("prefix", "load") for rate in (20, 40)}
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_model_that_runs_here_is_compared_with_its_simulation(tmp_path):
    folder = tiny_folder.save(tmp_path / "tiny")
    command = [sys.executable, str(ROOT / "benchmarks/simulate.py"), "compare", str(folder), "--requests", "4",
               "--json", str(tmp_path / "out.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    for name in ("at once", "Poisson", "shared prefix"):
        run, simulated = outcomes[f"{name}, run"], outcomes[f"{name}, simulated"]
        for told in ("num_requests", "output_tokens", "prompt_tokens"):
            assert run[told] == simulated[told] > 0
        assert simulated["prefix_hit_rate"] == pytest.approx(run["prefix_hit_rate"], abs=0.05)
        assert f"{run['output_tokens_s']:,.0f} / " in done.stdout

"""From what systems did to what a reader sees: agreement, medians, table, JSON and chart. No model is run."""

import json

import pytest

from paged_bench import ab, chart, report
from paged_bench.agreement import compare, first_difference, reference_of
from paged_bench.quality import Quality
from paged_bench.results import Run, Sample, percentile, summarise
from paged_bench.worker import ModelFacts
from paged_bench.workloads import BenchRequest, Workload
from paged_core import ConfigError, EngineConfig

REQUESTS = tuple(BenchRequest(i, (10 + i, 20 + i), 4) for i in range(3))


def run(tokens, duration_s=2.0, start_s=0.5, **more):
    """A run in which each token came a quarter of a second after the one before."""
    samples = {
        index: (Sample(tuple(ids), tuple(start_s + 0.25 * i for i in range(len(ids)))),)
        for index, ids in tokens.items()
    }
    return Run(samples, duration_s, **more)


SAME = {0: [1, 2, 3, 4], 1: [5, 6, 7, 8], 2: [9, 1, 2, 3]}
OTHER = {**SAME, 1: [5, 6, 99, 8]}


def test_the_first_differing_token_is_found_and_both_choices_named():
    difference = first_difference(7, [1, 2, 9, 4], [1, 2, 3, 4])
    assert (difference.index, difference.position, difference.token_id, difference.reference_id) == (7, 2, 9, 3)


def test_equal_outputs_have_no_difference_and_a_shorter_one_differs_at_its_end():
    assert first_difference(0, [1, 2], [1, 2]) is None
    assert first_difference(0, [1], [1, 2]).position == 1
    assert first_difference(0, [1], [1, 2]).token_id is None


def test_the_margin_is_asked_at_the_prompt_and_the_tokens_both_agree_on():
    asked = []

    def margins(questions):
        asked.extend(questions)
        return [(0.25, 0.5)] * len(questions)

    reference, _ = reference_of({"hf-sequential": run(SAME).samples})
    agreement = compare("paged", run(OTHER).samples, reference, REQUESTS, margins)
    assert asked == [((11, 21, 5, 6), 7, 99)]
    assert (agreement.num_identical, agreement.num_compared) == (2, 3)
    assert (agreement.differences[0].margin, agreement.differences[0].gap) == (0.25, 0.5)


def test_requests_that_one_at_a_time_left_out_are_held_against_static_batches():
    part = {0: SAME[0]}
    systems = {"paged": run(SAME).samples, "hf-static:16": run(OTHER).samples, "hf-sequential": run(part).samples}
    reference, words = reference_of(systems)
    assert {index: name for index, (name, _) in reference.items()} == {
        0: "hf-sequential",
        1: "hf-static:16",
        2: "hf-static:16",
    }
    assert words == "hf-sequential (1 requests), else hf-static:16 (2 requests)"
    static = compare("hf-static:16", systems["hf-static:16"], reference, REQUESTS, None)
    assert static.num_compared == 1, "nobody is compared with himself"


def test_percentiles_are_values_that_occurred():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(range(1, 201), 99) == 198
    assert percentile([4.0], 99) == 4.0


def test_medians_are_taken_over_the_runs_and_the_peak_is_the_highest():
    runs = [run(SAME, duration_s=d, peak_bytes=p, kv_waste=w) for d, p, w in [(1, 10, 0.1), (2, 30, 0.3), (4, 20, 0.2)]]
    summary = summarise("paged", runs, REQUESTS)
    assert summary.tokens_per_s == 6.0
    assert summary.tokens_per_s_all == (12.0, 6.0, 3.0)
    assert (summary.peak_bytes, summary.kv_waste) == (30, 0.2)
    assert (summary.ttft_p50_s, summary.itl_p50_s) == (0.5, 0.25)


def test_the_wait_for_the_first_token_counts_from_the_arrival():
    late = tuple(BenchRequest(r.index, r.prompt, r.num_output, arrival_s=0.4) for r in REQUESTS)
    assert summarise("paged", [run(SAME)], late).ttft_p50_s == pytest.approx(0.1)


def test_a_system_that_ran_a_part_of_the_requests_shows_no_wait_for_the_first_token():
    summary = summarise("hf-sequential", [run({0: SAME[0]})], REQUESTS)
    assert summary.ttft_p50_s is None
    assert summary.num_requests == 1


@pytest.fixture
def outcome():
    runs = {
        "paged": [run(SAME, duration_s=1.0, peak_bytes=2**20, kv_waste=0.03)],
        "hf-static:16": [run(OTHER, duration_s=4.0, peak_bytes=3 * 2**20, kv_waste=0.6)],
        "hf-sequential": [run({0: SAME[0]}, duration_s=4.0, kv_waste=0.0)],
    }
    reference, words = reference_of({name: done[0].samples for name, done in runs.items()})
    agreements = [
        compare(name, done[0].samples, reference, REQUESTS, lambda asked: [(0.001, 0.002)] * len(asked))
        for name, done in runs.items()
    ]
    return ab.Outcome(
        facts=ModelFacts("a-model", "float32", 512, 1_000_000, 2),
        workload=Workload("made up", REQUESTS, ("a note",)),
        order=("paged", "hf-static:16", "hf-sequential"),
        summaries=tuple(summarise(name, done, REQUESTS) for name, done in runs.items()),
        failures={"hf-continuous": "RuntimeError: its manager died"},
        agreements=tuple(agreement for agreement in agreements if agreement.num_compared),
        quality=Quality("int8", 1000, 20.0, 20.1, 0.95),
        reference=words,
    )


def test_the_table_shows_every_system_its_ratio_and_its_agreement(outcome, capsys):
    report.print_tables(outcome)
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert " 12.0 " in lines["paged"]
    assert "3.0%" in lines["paged"]
    assert "4.0x" in lines["hf-static:16"]
    assert lines["paged"].rstrip().endswith("2/3"), "static chose another token, and was the reference there"
    assert "hf-sequential*" in lines
    assert "hf-sequential: 1 of 3 requests" in shown
    assert "hf-continuous failed: RuntimeError: its manager died" in shown
    assert "request 1: differs from output token 2 on, where stock's two likeliest logits are 0.001 apart" in shown


def test_the_plain_table_is_aligned(outcome):
    lines = report.plain_table(report.rows(outcome)).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_json_holds_the_figures_and_what_they_were_made_with(outcome, tmp_path):
    path = tmp_path / "new" / "out.json"
    report.write_json(outcome, path, EngineConfig(block_size=8), seed=5)
    data = json.loads(path.read_text())
    assert data["systems"]["hf-static:16"]["paged_is_times"] == 4.0
    assert data["agreement"]["paged"]["fraction"] == pytest.approx(2 / 3)
    assert data["agreement"]["paged"]["differences"][0]["margin"] == 0.001
    assert (data["seed"], data["engine"]["block_size"], data["model"]["dtype"]) == (5, 8, "float32")
    assert data["hardware"]["cpu"]
    assert data["versions"]["torch"]
    assert data["workload"]["output_tokens"] == [4, 4, 4]


def test_what_quantised_weights_cost_stands_below_the_table_and_in_the_json(outcome, tmp_path):
    line = next(line for line in report.remarks(outcome) if line.startswith("int8 weights"))
    assert "20.100, +0.50% (20.000 with the weights as they are)" in line and "same at 95.0%" in line
    report.write_json(outcome, tmp_path / "out.json", EngineConfig(weights="int8"), seed=0)
    assert json.loads((tmp_path / "out.json").read_text())["quality"]["change"] == pytest.approx(0.005)
    plain = ab.Outcome(**{**vars(outcome), "quality": None})
    assert not any("weights" in line for line in report.remarks(plain))


def test_the_json_is_strict_even_where_a_margin_could_not_be_measured(outcome, tmp_path):
    difference = outcome.agreements[0].differences[0].__class__(0, 0, 1, 2, float("nan"), float("nan"))
    agreement = outcome.agreements[0].__class__("paged", 3, (difference,))
    broken = ab.Outcome(**{**vars(outcome), "agreements": (agreement,)})
    report.write_json(broken, tmp_path / "out.json", EngineConfig(), seed=0)
    data = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert data["agreement"]["paged"]["differences"][0]["margin"] is None


def test_the_chart_is_a_png(outcome, tmp_path):
    path = tmp_path / "new" / "chart.png"
    chart.write(outcome, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_runs_are_interleaved():
    assert ab.run_order(["a", "b"], repeats=2, quick=False) == ["a", "b", "paged", "a", "b", "paged"]
    assert ab.run_order(["a", "b"], repeats=9, quick=True) == ["paged", "a", "b", "paged"]


def test_an_unknown_baseline_is_refused_with_those_there_are():
    assert ab.parse_baselines("hf-static:16, hf-sequential") == ["hf-static:16", "hf-sequential"]
    for text in ("hf-static", "hf-static:0", "tgi"):
        with pytest.raises(ConfigError, match="hf-static:SIZE"):
            ab.parse_baselines(text)

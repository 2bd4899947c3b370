"""What the benchmark asks for: the same work for everybody who names the same seed."""

import json

import pytest

from paged_bench import workloads
from paged_bench.workloads import BenchRequest, Workload
from paged_core import ConfigError


def encode(text):
    """A token for every four characters: about English's rate."""
    return [sum(text[i : i + 4].encode()) for i in range(0, len(text), 4)]


def test_the_same_seed_gives_the_same_workload_and_another_seed_another():
    assert workloads.synthetic(encode, seed=3) == workloads.synthetic(encode, seed=3)
    assert workloads.synthetic(encode, seed=3).requests != workloads.synthetic(encode, seed=4).requests


@pytest.mark.parametrize("seed", [0, 1, 99])
def test_every_seed_asks_for_the_same_amount_of_work(seed):
    work = workloads.synthetic(encode, seed=seed)
    assert (len(work.requests), work.num_prompt_tokens, work.num_output_tokens) == (64, 3339, 6950)


def test_prompts_have_20_to_120_tokens_and_outputs_8_to_256_with_a_heavy_tail():
    work = workloads.synthetic(encode)
    prompts = sorted(len(request.prompt) for request in work.requests)
    outputs = sorted(request.num_output for request in work.requests)
    assert (prompts[0], prompts[-1]) == (20, 120)
    assert (outputs[0], outputs[-1]) == (8, 256)
    assert outputs[32] < 0.8 * work.num_output_tokens / 64, "the median lies well below the mean"
    assert [request.arrival_s for request in work.requests] == [0.0] * 64


def test_no_two_prompts_are_the_same():
    assert len({request.prompt for request in workloads.synthetic(encode).requests}) == 64


def test_poisson_arrivals_come_in_order_and_at_about_the_rate_asked_for():
    arrivals = [r.arrival_s for r in workloads.with_poisson_arrivals(workloads.synthetic(encode, 400), 5.0).requests]
    assert arrivals == sorted(arrivals)
    assert 400 / arrivals[-1] == pytest.approx(5.0, rel=0.2)


def test_a_shared_prefix_is_the_same_for_all_and_has_the_length_asked_for():
    plain = workloads.synthetic(encode, 8)
    shared = workloads.with_shared_prefix(plain, encode, 512)
    assert len({request.prompt[:512] for request in shared.requests}) == 1
    assert [request.prompt[512:] for request in shared.requests] == [request.prompt for request in plain.requests]


def test_a_request_that_is_too_long_is_cut_to_fit_and_a_note_counts_it():
    work = Workload("two", (BenchRequest(0, tuple(range(90)), 40), BenchRequest(1, (1, 2, 3), 5)))
    cut = workloads.fitted(work, 100)
    assert [(len(r.prompt), r.num_output) for r in cut.requests] == [(60, 40), (3, 5)]
    assert cut.notes == ("1 of 2 requests cut to 100 tokens",)


TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0000000,30,8
2023-11-16 18:17:03.5000000,48,10
2023-11-16 18:17:05.5000000,7,27
"""


def test_a_trace_is_replayed_in_order_of_time_with_its_own_lengths(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    work = workloads.from_trace(encode, path)
    assert [(len(r.prompt), r.num_output, r.arrival_s) for r in work.requests] == [
        (48, 10, 0.0),
        (30, 8, 0.5),
        (7, 27, 2.0),
    ]


def test_a_trace_can_be_stretched_or_brought_to_a_rate(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    stretched = workloads.from_trace(encode, path, time_scale=10)
    assert [r.arrival_s for r in stretched.requests] == [0.0, 5.0, 20.0]
    rated = workloads.from_trace(encode, path, rate=6.0)
    assert rated.requests[-1].arrival_s == pytest.approx(0.5), "three requests in half a second"
    assert "times 0.25" in rated.notes[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("a,b\n1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,1,2\n2,,3\n", "line 3"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_line(tmp_path, text, told):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        workloads.from_trace(encode, path)


def test_prompts_come_one_a_line_with_the_usual_spread_of_lengths(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("Tell me a story.\n\nWhat is a lighthouse?\n")
    work = workloads.from_prompts(encode, path)
    assert [r.prompt for r in work.requests] == [
        tuple(encode("Tell me a story.")),
        tuple(encode("What is a lighthouse?")),
    ]
    assert sorted(r.num_output for r in work.requests) == workloads.output_lengths(2)


def test_a_jsonl_file_may_say_how_many_tokens_to_generate(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Hello there", "max_tokens": 7}) + "\n")
    assert workloads.from_prompts(encode, path).requests[0].num_output == 7
    path.write_text('{"text": "Hello"}\n')
    with pytest.raises(ConfigError, match="max_tokens"):
        workloads.from_prompts(encode, path)


def test_a_file_that_is_not_there_is_an_error_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        workloads.from_prompts(encode, tmp_path / "nowhere.txt")

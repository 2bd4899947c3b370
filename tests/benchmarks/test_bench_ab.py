"""The A/B from end to end, on a random model of two layers: every system, in its own process where it matters."""

import json
import multiprocessing

import pytest
import torch

from paged_bench.paged import Paged
from paged_bench.stock import HFContinuous, HFSequential, HFStatic
from paged_bench.worker import SystemFailed, SystemProcess, SystemSpec
from paged_bench.workloads import BenchRequest
from paged_core import EngineConfig, cli

CONFIG = EngineConfig(attention_backend="reference", kv_cache_bytes=1 << 20, max_num_batched_tokens=64, max_num_seqs=8)


@pytest.fixture(autouse=True)
def children_share_their_imports(monkeypatch):
    """Forked from a server that has imported what they need: each would take seconds for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paged_coverage.preload"])  # the server may be that of other tests
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with a byte-level tokenizer, saved as its users would."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


REQUESTS = tuple(
    BenchRequest(i, tuple(3 + (7 * i + j) % 200 for j in range(5 + 9 * i)), num_output)
    for i, num_output in enumerate((9, 3, 14, 1, 6))
)


def run(system, requests=REQUESTS):
    told = []
    result = system.run(requests, told.append)
    assert sum(told) == result.num_output_tokens
    return result


def test_all_systems_generate_the_same_tokens_and_as_many_as_asked_for(model):
    expected = run(HFSequential(model, limit_s=1e9))
    assert {i: len(samples[0].token_ids) for i, samples in expected.samples.items()} == {
        request.index: request.num_output for request in REQUESTS
    }
    for system in (HFStatic(model, 2), HFContinuous(model), Paged(model, CONFIG)):
        found = run(system)
        tokens = {i: samples[0].token_ids for i, samples in found.samples.items()}
        assert tokens == {i: samples[0].token_ids for i, samples in expected.samples.items()}, system
        for samples in found.samples.values():
            assert list(samples[0].times_s) == sorted(samples[0].times_s)
            assert len(samples[0].times_s) == len(samples[0].token_ids)
            assert 0 < samples[0].times_s[-1] <= found.duration_s


def test_the_end_of_sequence_token_ends_nothing_and_is_not_forbidden(model):
    """Whatever greedy chooses first is declared to be the end: all systems must go on past it, with the same tokens."""
    first = run(HFStatic(model, 1), REQUESTS[:1]).samples[0][0].token_ids
    model.generation_config.eos_token_id = model.config.eos_token_id = first[0]
    try:
        assert run(HFStatic(model, 1), REQUESTS[:1]).samples[0][0].token_ids == first
        assert run(Paged(model, CONFIG), REQUESTS[:1]).samples[0][0].token_ids == first
    finally:
        model.generation_config.eos_token_id = model.config.eos_token_id = None


def test_several_samples_a_prompt_are_drawn_by_stock_and_paged_alike(model):
    requests = [BenchRequest(0, REQUESTS[2].prompt, 12, n=3), BenchRequest(1, REQUESTS[1].prompt, 4, n=3)]
    for system in (HFStatic(model, 2), Paged(model, CONFIG)):
        found = run(system, requests)
        assert [len(sample.token_ids) for sample in found.samples[0]] == [12, 12, 12]
        assert len({sample.token_ids for sample in found.samples[0]}) > 1


def test_one_at_a_time_takes_an_even_selection_when_all_would_take_too_long(model):
    system = HFSequential(model, limit_s=1e-9)
    run(system, REQUESTS[:1])  # a warm-up, which tells nothing of the whole
    assert list(run(system, REQUESTS).samples) == [0]


def test_no_system_begins_before_a_request_arrives(model):
    late = [BenchRequest(0, REQUESTS[0].prompt, 2), BenchRequest(1, REQUESTS[1].prompt, 2, arrival_s=0.4)]
    for system in (HFStatic(model, 2), HFContinuous(model), Paged(model, CONFIG)):
        assert run(system, late).samples[1][0].times_s[0] >= 0.4, system


def test_padding_and_finished_rows_of_a_static_batch_count_as_waste(model):
    requests = [BenchRequest(0, (5, 6, 7, 8), 2), BenchRequest(1, (5, 6), 1)]
    # two steps: 2 rows of 4, then of 5 slots; held are 4 + 5 of the first row and 2 of the second
    assert run(HFStatic(model, 2), requests).kv_waste == pytest.approx(1 - 11 / 18)
    assert run(HFStatic(model, 1), requests).kv_waste == 0.0


def test_paged_wastes_less_than_a_block_a_request(model):
    waste = run(Paged(model, CONFIG)).kv_waste
    assert 0 < waste < 0.5


def test_a_child_that_can_not_load_its_model_says_why_in_a_line(tmp_path):
    worker = SystemProcess(SystemSpec("paged", str(tmp_path / "nowhere"), None, CONFIG, 1.0))
    try:
        with pytest.raises(SystemFailed, match="nowhere") as failure:
            worker.facts()
        assert "\n" not in str(failure.value)
    finally:
        worker.close()


def test_the_command_compares_prints_and_writes(folder, tmp_path, capfd):
    status = cli.main(
        [
            "bench",
            str(folder),
            *("--baseline", "hf-static:4", "--repeats", "1", "--requests", "6", "--max-model-len", "64"),
            *("--kv-bytes", "1000000", "--attention-backend", "reference"),
            *("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")),
        ]
    )
    shown = capfd.readouterr().out
    assert status == 0
    assert "6/6" in shown
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["agreement"]["paged"]["fraction"] == 1.0
    assert data["order"] == ["hf-static:4", "paged"]
    assert data["systems"]["paged"]["tokens_per_s"] > 0
    assert data["systems"]["paged"]["peak_bytes"] >= 0
    assert all(
        p + o <= 64 for p, o in zip(*(data["workload"][k] for k in ("prompt_tokens", "output_tokens")), strict=True)
    )
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_generate_streams_the_same_text_that_stock_generates(folder, model, capsys, monkeypatch):
    import io
    import sys

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "A lighthouse"
    HFStatic(model, 1)  # sets the generation config aside
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    stock = model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    expected = tokenizer.decode(stock, skip_special_tokens=True)
    options = ["--max-tokens", "12", "--kv-bytes", "1000000", "--attention-backend", "reference"]
    assert cli.main(["generate", str(folder), prompt, *options]) == 0
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert cli.main(["generate", str(folder), "-", *options]) == 0
    assert capsys.readouterr().out == expected + "\n"

"""One model on two ranks: the same tokens as on one, whatever the engine does meanwhile; clear words where it can't.

Rank 1 is one process for all models here (lent_rank.py); tests/core/ranks is about processes.
"""

import os
import signal
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from lent_rank import LentRank
from paged_core import (
    LLM,
    ConfigError,
    Engine,
    EngineConfig,
    EngineDeadError,
    SamplingParams,
    UnsupportedModel,
    hookimpl,
)
from paged_core.ranks import processes
from tiny_model import TinyModel

SIZES = {
    "vocab_size": 67,  # an odd one: the last rank has less of it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
    "gemma3": Gemma3TextConfig(**SIZES, **WINDOWED, query_pre_attn_scalar=8),
    "mixtral": MixtralConfig(**SIZES, **MOE),
    "gpt_oss": GptOssConfig(**SIZES, **WINDOWED, **MOE, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}),
    "phi3": Phi3Config(**SIZES),
}
KV_HEADS = {"phi3": 2, "gpt_oss": 2}  # of a rank, where the plan leaves attention whole
COMMON = [int(i) for i in torch.randint(3, 67, (22,), generator=torch.Generator().manual_seed(1))]
PROMPTS = [[*COMMON, 5, 9], [*COMMON, 11], [7, 8, 9] * 5, [*COMMON[:9], 30, 31]]


@pytest.fixture(scope="module")
def lent():
    lent = LentRank()
    yield lent
    lent.end()


@pytest.fixture
def ranks(lent, monkeypatch):
    monkeypatch.setattr(processes, "start", lent.start)


@pytest.fixture
def idle_ranks(monkeypatch):
    """Ranks that do nothing: what is refused is refused without them."""

    def start(rank, job):
        ours, _ = Pipe()
        return processes.RankProcess(rank, subprocess.Popen(["sleep", "60"]), ours)

    monkeypatch.setattr(processes, "start", start)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where a model of each kind lies: random, and so large in its weights that greedy tokens vary."""
    made = {}

    def folder(name, config=None):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config or CONFIGS[name])
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(0, 0.3) if weight.ndim >= 2 else weight.add_(torch.randn_like(weight) * 0.1)
            model.save_pretrained(made[name])
        return made[name]

    return folder


class Watch:
    """What the engine has done on the way."""

    @hookimpl
    def on_step_finished(self, stats):
        self.stats = stats


def answers(folder, size, **options):
    """Greedy rows of a batch that is too large for the cache, drawn samples, beams, and prompts that are cached."""
    watch = Watch()
    llm = LLM(folder, tensor_parallel_size=size, block_size=4, num_blocks=26, plugins=[watch], **options)
    try:
        greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        drawn = SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=8, logprobs=2, prompt_logprobs=1)
        beams = SamplingParams(use_beam_search=True, temperature=0, n=3, max_tokens=8, ignore_eos=True)
        tokens = [
            [output.token_ids for answer in llm.generate(prompts, params) for output in answer.outputs]
            for prompts, params in ((PROMPTS, greedy), (PROMPTS[:1], drawn), (PROMPTS[1:2], beams), (PROMPTS, greedy))
        ]
        llm.engine.check()
        return tokens, watch.stats, llm
    finally:
        llm.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_give_the_tokens_of_one_through_preemption_beams_and_the_prefix_cache(name, folders, ranks):
    threads = torch.get_num_threads()
    want, _, one = answers(folders(name), 1)
    got, stats, two = answers(folders(name), 2)
    assert got == want
    assert len({tuple(row) for call in want for row in call}) > 5, "rows that are all alike would tell nothing"
    assert stats.total_preemptions > 0
    assert stats.total_prefix_hits > 0
    assert two.engine.spec.layers[0].num_kv_heads == KV_HEADS.get(name, 1)
    assert one.engine.spec.layers[0].num_kv_heads == 2
    assert not dist.is_initialized()
    assert torch.get_num_threads() == threads


def test_a_shard_runs_whole_decoder_layers_and_packed_products(folders, ranks):
    with closing(LLM(folders("llama"), tensor_parallel_size=2, num_blocks=8)) as llm:
        kinds = [type(forward).__name__ for forward in llm.engine._model.fast_forwards.values()]
    assert kinds.count("DecoderLayer") == 2
    assert kinds.count("_SplitLinear") == 1  # the head


def test_experts_that_the_plan_leaves_whole_are_shared_out(folders, ranks):
    with closing(LLM(folders("gpt_oss"), tensor_parallel_size=2, num_blocks=8)) as llm:
        experts = llm.engine._model.model.model.layers[0].mlp.experts
        assert [len(weight) for weight in experts.parameters()] == [2] * 4


def test_a_rank_counts_the_bytes_of_its_own_heads(folders, ranks):
    with closing(LLM(folders("llama"), tensor_parallel_size=2, kv_cache_bytes=1 << 16)) as llm:
        assert llm.sizes.num_blocks == (1 << 16) // (2 * 2 * 8 * 8 * 4)  # 2 layers, k and v, 8 slots of one head of 8


def test_bfloat16_runs_on_two_ranks(folders, ranks):
    prompt, params = [PROMPTS[0]], SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True)
    told = []
    for size in (1, 2):
        with closing(LLM(folders("llama"), tensor_parallel_size=size, dtype="bfloat16", num_blocks=16)) as llm:
            told.append(llm.generate(prompt, params)[0].outputs[0])
    one, two = (next(iter(output.logprobs[0].values())).logprob for output in told)
    assert one == pytest.approx(two, abs=0.1)


# ---- what can't be had -----------------------------------------------------------------------------------------


def refusal(model, size=2, **options):
    with pytest.raises((ConfigError, UnsupportedModel)) as told:
        LLM(model, tensor_parallel_size=size, **options)
    assert not dist.is_initialized()
    return str(told.value)


def test_a_size_that_does_not_divide_the_heads_names_those_that_do(folders, idle_ranks):
    told = refusal(folders("llama"), 4)
    assert "doesn't divide the num_key_value_heads" in told
    assert told.endswith("use one of 1, 2")


def test_a_model_without_a_plan_is_refused(folders, idle_ranks):
    told = refusal(folders("gpt2", GPT2Config(vocab_size=67, n_embd=32, n_layer=1, n_head=2, n_positions=64)))
    assert "no tp_plan for GPT2LMHeadModel" in told
    assert told.endswith("leave tensor_parallel_size out")


def test_what_only_this_process_has_is_refused_before_any_process_starts(folders, monkeypatch):
    monkeypatch.setattr(processes, "start", None)
    live = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert "save_pretrained" in refusal(live)
    assert "save_pretrained" in refusal(TinyModel())

    class Backend:
        @hookimpl
        def create_attention_backend(self, name): ...

    assert "brings create_attention_backend" in refusal(folders("llama"), plugins=[Backend()])
    assert "say 'cuda'" in refusal(folders("llama"), device="cuda:1")
    for name, value in {"kv_disk_path": "kv", "compile_model": True, "cuda_graphs": True, "lookahead": True}.items():
        assert f"{name} is {value!r}" in refusal(folders("llama"), **{name: value})


def test_torch_without_distributed_and_one_in_use_are_told_apart(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "start", None)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_available", lambda: False)
        assert "built without torch.distributed; leave tensor_parallel_size out" in refusal(folders("llama"))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="in use in this process already"):
            LLM(folders("llama"), tensor_parallel_size=2)
        assert dist.is_initialized(), "it is somebody else's"
    finally:
        dist.destroy_process_group()


def test_a_gguf_file_is_refused(idle_ranks, tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "is a GGUF file, which is read whole" in refusal(str(tmp_path / "model.gguf"))


def test_a_plugin_that_loads_whole_models_is_told_so(folders, idle_ranks, monkeypatch):
    monkeypatch.setattr("paged_hf.loading.load.load_model", lambda *source, **asked: TinyModel())
    assert "can't split it; leave tensor_parallel_size out" in refusal(folders("llama"))


def test_a_transformers_that_cannot_split_is_told_so(folders, idle_ranks, monkeypatch):
    monkeypatch.setattr("paged_hf.upstream._distributed_config", lambda: None)
    assert "install 5.24 or later" in refusal(folders("llama"))


def test_kv_cannot_be_read_back_where_they_are_spread(folders, ranks):
    engine = Engine(folders("llama"), EngineConfig(tensor_parallel_size=2, num_blocks=8))
    (request,) = engine.add_request("r", [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    with pytest.raises(ValueError, match="spread over ranks"):
        engine.read_kv(request)
    engine.close()


def test_a_dead_rank_ends_the_engine_within_seconds(folders, ranks, lent):
    """Last: it costs the process that the others here share."""
    llm = LLM(folders("llama"), tensor_parallel_size=2, num_blocks=64)
    endless = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    steps = []

    def kill(tokens, logits):
        steps.append(tokens)
        if len(steps) == 5:
            os.kill(lent.pid, signal.SIGKILL)
        return logits

    began = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"rank 1 \(process \d+\) was killed by signal 9.*build a new one"):
        llm.generate([[3, 4, 5]], replace(endless, logits_processors=[kill]))
    with pytest.raises(EngineDeadError, match="takes no more requests"):
        llm.generate([[3, 4, 5]], endless)
    assert time.monotonic() - began < 10
    assert not dist.is_initialized()

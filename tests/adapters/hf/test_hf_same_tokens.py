"""Logits of a model on the CPU, bit for bit the same whatever the engine does: who shares a prefix, what comes in one
step, how large blocks are, who was preempted."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_core import Engine, EngineConfig, SamplingParams

NUM = 64
PREFIX = [(11 * i + i * i // 3) % 199 for i in range(150)]
PROMPTS = [PREFIX + [(7 * i + j * j) % 199 for j in range(5 + i % 30)] for i in range(NUM)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=199, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return LlamaForCausalLM(config).eval().to(request.param)


def answers(model, prompts, num=0, **config):
    """For each prompt, its tokens and the logprobs of the best five at each; how often requests were preempted."""
    engine = Engine(model, EngineConfig(**{"block_size": 8, "num_blocks": 2000, "max_num_seqs": NUM, **config}))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
    requests = [engine.add_request(str(i), prompt, params)[0] for i, prompt in enumerate(prompts)]
    logprobs = {str(i): [] for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            logprobs[output.request.id] += [
                sorted((token, each.logprob) for token, each in at.items()) for at in output.logprobs or ()
            ]
    engine.close()
    tokens = [request.output_token_ids for request in requests]
    return list(zip(tokens, logprobs.values(), strict=True)), engine.last_stats.total_preemptions


@pytest.fixture(scope="module")
def one_by_one(model):
    """What each prompt gets by itself, nothing shared."""
    return [answers(model, [prompt])[0][0] for prompt in PROMPTS[::8]]


WAYS = {
    "together, a prefix in common": {},
    "blocks of 16": {"block_size": 16},
    "blocks of 32": {"block_size": 32},
    "few tokens a step": {"max_num_batched_tokens": 48, "max_num_seqs": 48},
    "preempted": {"num_blocks": 60, "max_num_seqs": 40, "enable_prefix_caching": False, "max_num_batched_tokens": 200},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_logits_are_those_of_each_request_by_itself(model, one_by_one, way):
    got, preemptions = answers(model, PROMPTS, **way)
    assert got[::8] == one_by_one
    assert (preemptions > 0) == ("num_blocks" in way)

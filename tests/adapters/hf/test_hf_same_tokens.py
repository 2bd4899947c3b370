"""Logits of a model on the CPU, bit for bit the same whatever the engine does: who shares a prefix, what comes in one
step, how large blocks are, who was preempted. With its weights as they are, and packed as integers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_core import Engine, EngineConfig, SamplingParams
from paged_kernels.cpu import launch

NUM = 64
PREFIX = [(11 * i + i * i // 3) % 199 for i in range(150)]
PROMPTS = [PREFIX + [(7 * i + j * j) % 199 for j in range(5 + i % 30)] for i in range(NUM)]


# Numbers of either dtype become integers of the same kind before a product: each kind of these stands once.
KINDS = [(torch.float32, None), (torch.float32, "int4"), (torch.bfloat16, None), (torch.bfloat16, "int8")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-weights {kind[1]}")
def kind(request):
    """The model's dtype, and what the engine makes of its weights."""
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=199, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return LlamaForCausalLM(config).eval().to(kind[0])


@pytest.fixture(scope="module")
def weights(kind):
    return kind[1]


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
SAMPLES = SamplingParams(n=3, seed=5, max_tokens=24, ignore_eos=True, logprobs=5)
BEAMS = SamplingParams(n=3, use_beam_search=True, max_tokens=24, ignore_eos=True)


def answers(model, prompts, params=GREEDY, **config):
    """For each prompt, and each of its sequences: its tokens and the logprobs of the best five at each, or of beams the
    sums; and how often requests were preempted."""
    engine = Engine(model, EngineConfig(**{"block_size": 8, "num_blocks": 2000, "max_num_seqs": NUM, **config}))
    asked = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    logprobs = {(request.id, request.index): [] for requests in asked for request in requests}
    while engine.has_work:
        for output in engine.step():
            logprobs[output.request.id, output.request.index] += [
                sorted((token, each.logprob) for token, each in at.items()) for at in output.logprobs or ()
            ]
    engine.close()
    if params.use_beam_search:
        searches = [requests[0].selector for requests in asked]
        found = [[(beam.token_ids, beam.cumulative_logprob) for beam in search.best] for search in searches]
    else:
        found = [[(each.output_token_ids, logprobs[each.id, each.index]) for each in requests] for requests in asked]
    return found, engine.last_stats.total_preemptions


@pytest.fixture(scope="module")
def one_by_one(model, weights):
    """What each prompt gets by itself, nothing shared."""
    return [answers(model, [prompt], weights=weights)[0][0] for prompt in PROMPTS[::8]]


WAYS = {
    "together, a prefix in common": {},
    "blocks of 16": {"block_size": 16},
    "blocks of 32": {"block_size": 32},
    "few tokens a step": {"max_num_batched_tokens": 48, "max_num_seqs": 48},
    "preempted": {"num_blocks": 60, "max_num_seqs": 40, "enable_prefix_caching": False, "max_num_batched_tokens": 200},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_logits_are_those_of_each_request_by_itself(model, weights, one_by_one, way):
    few = "num_blocks" in way  # who is preempted computes all again
    got, preemptions = answers(model, PROMPTS[:24] if few else PROMPTS, weights=weights, **way)
    assert got[::8] == (one_by_one[:3] if few else one_by_one)
    assert (preemptions > 0) == few


@pytest.fixture(scope="module", params=[SAMPLES, BEAMS], ids=["samples", "beams"])
def several(request, model, weights):
    """(what is asked for, what prompts get by themselves, each of their sequences reading all of its keys)."""
    with pytest.MonkeyPatch.context() as patched:
        init = launch.AttentionPlan.__init__
        patched.setattr(launch.AttentionPlan, "__init__", lambda self, *shape: init(self, *shape[:5]))
        return request.param, [answers(model, [prompt], request.param, weights=weights)[0][0] for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("way", ["together, a prefix in common", "blocks of 32", "preempted"])
def test_samples_and_beams_are_those_of_each_prompt_by_itself(model, weights, several, way):
    """Whether their sequences share blocks or not, and in the middle of a search that was preempted and recomputed."""
    params, expected = several
    room, num = ({"num_blocks": 90}, 6) if way == "preempted" else ({}, 12)
    got, preemptions = answers(model, PROMPTS[:num], params, weights=weights, **WAYS[way] | room)
    assert got[:2] == expected
    assert (preemptions > 0) == (way == "preempted")
    assert all(tokens for sequences in expected for tokens, _ in sequences)

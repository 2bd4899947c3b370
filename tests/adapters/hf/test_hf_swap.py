"""In bfloat16, computing a row's K/V again rounds otherwise; what was swapped out and in does not."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_core import Engine, EngineConfig, RequestStatus, SamplingParams
from paged_core.tiers.costs import TierCosts

NUM = 20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=199, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return LlamaForCausalLM(config).eval().to(torch.bfloat16)


def answers(model, num_blocks, path=None):
    """(tokens of each request, which of them were preempted, the engine's last numbers)"""
    config = EngineConfig(block_size=8, num_blocks=num_blocks, max_num_seqs=NUM, kv_disk_path=path)
    engine = Engine(model, config)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    requests = [
        engine.add_request(str(i), [(7 * i + j * j) % 199 for j in range(10 + i)], params)[0] for i in range(NUM)
    ]
    preempted = set()
    while engine.has_work:
        engine.step()
        preempted |= {r for r in requests if r.status is RequestStatus.WAITING and r.num_recomputed_to}
    engine.close()
    return [request.output_token_ids for request in requests], [r in preempted for r in requests], engine.last_stats


def test_twenty_of_twenty_requests_get_the_tokens_of_undisturbed_ones(model, tmp_path, monkeypatch):
    monkeypatch.setattr(TierCosts, "wants_more", True)
    monkeypatch.setattr(TierCosts, "wants_back", True)
    monkeypatch.setattr(TierCosts, "pays", lambda self, num_blocks, num_tokens, beside: True)
    monkeypatch.setattr(TierCosts, "pays_beside", lambda self, num_blocks, num_tokens: False)
    monkeypatch.setattr(TierCosts, "patience_s", lambda self, num_tokens: 60.0)
    undisturbed, none, _ = answers(model, 400)
    assert not any(none)
    swapped, preempted, stats = answers(model, 70, str(tmp_path))
    assert sum(preempted) >= 5
    assert stats.offloading.total_loads_abandoned == 0
    assert [a == b for a, b in zip(swapped, undisturbed, strict=True)] == [True] * NUM

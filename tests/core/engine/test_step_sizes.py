"""How many tokens and sequences a step has where nobody says: by what the processor does with the model's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paged_core import EngineConfig
from paged_core.engine.sizes import step_sizes
from paged_core.execution.spec import LayerSpec, ModelSpec

CPU = torch.device("cpu")


def spec_of(dtype: torch.dtype) -> ModelSpec:
    layer = LayerSpec(num_heads=2, num_kv_heads=2, head_dim=16, value_head_dim=16, scale=0.25, device=CPU)
    return ModelSpec(layers=(layer,), vocab_size=50, max_model_len=512, dtype=dtype, device=CPU)


@pytest.mark.parametrize(
    "able, dtype, weights, tokens",
    [
        ({"amx_bf16"}, torch.bfloat16, None, 256),
        ({"amx_bf16"}, torch.float32, None, 64),
        ({"amx_bf16"}, torch.float32, "int8", 64),
        ({"amx_int8"}, torch.float32, "int8", 256),
        ({"amx_int8"}, torch.bfloat16, None, 64),
        (set(), torch.bfloat16, "int4", 64),
    ],
)
def test_tokens_of_a_step_go_by_the_instructions_for_the_weights(
    able: set[str], dtype: torch.dtype, weights: str | None, tokens: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able, True), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    sizes = step_sizes(EngineConfig(weights=weights), spec_of(dtype))
    assert sizes.max_num_batched_tokens == 3 * tokens
    assert sizes.max_num_seqs == min(256, 3 * tokens // 2)


def test_a_wish_is_honoured_and_bounds_hold(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert step_sizes(EngineConfig(), spec_of(torch.bfloat16)).max_num_batched_tokens == 2048
    assert step_sizes(EngineConfig(max_num_batched_tokens=40), spec_of(torch.bfloat16)).max_num_batched_tokens == 40
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert step_sizes(EngineConfig(), spec_of(torch.float32)).max_num_batched_tokens == 128


def test_a_torch_that_does_not_tell_what_a_processor_can_do_gets_small_steps(monkeypatch: Any) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert step_sizes(EngineConfig(), spec_of(torch.bfloat16)).max_num_batched_tokens == 256

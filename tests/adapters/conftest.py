"""Tiny random transformers models, and the two ways to run them that the tests compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers

from alphabet_model import Gate
from paged_core import Engine, EngineConfig, SamplingParams

transformers.utils.logging.disable_progress_bar()
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # for tiny tensors, a second thread only costs time

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention"]
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_OWN: dict[str, dict[str, Any]] = {  # further settings of each model type
    "mistral": {"sliding_window": 9},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "gpt2": {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "n_inner": 64},
    "opt": {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "ffn_dim": 64,
            "word_embed_proj_dim": 48},
    "phi3": {"head_dim": None},
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0},
    "gemma3_text": {"sliding_window": 9, "layer_types": _MIXED},
    "mixtral": _MOE,
    "phimoe": {**_MOE, "sliding_window": 9, "head_dim": None},
    "olmo2": {"head_dim": None},
    "gpt_oss": {**_MOE, "sliding_window": 9, "layer_types": _MIXED},
    "starcoder2": {"head_dim": None, "sliding_window": 9},
    "stablelm": {"head_dim": None, "hidden_size": 64},
    "deepseek_v3": {"head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
                    "first_k_dense_replace": 1},
    "cohere": {"head_dim": None, "logit_scale": 0.5},
    "llama4_text": {**_MOE, "num_hidden_layers": 4, "num_experts_per_tok": 1, "attention_chunk_size": 8192,
                    "intermediate_size_mlp": 64},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """Return ``make``: ``tiny("llama", **config)`` makes a random model whose greedy tokens vary."""

    def make(model_type: str, seed: int = 0, **own: Any) -> Any:
        settings = {**_SIZES, **_OWN.get(model_type, {}), **own}
        settings = {name: value for name, value in settings.items() if value is not None or name == "eos_token_id"}
        config = transformers.CONFIG_MAPPING[model_type](**settings)
        torch.manual_seed(seed)
        # The SDPA of transformers 5.20 ignores gemma2's softcap. Eager attention computes the model as it is meant.
        attention = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
        model = transformers.AutoModelForCausalLM.from_config(config, **attention).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:  # small embeddings, so that a token is not simply followed by itself
                    weight.normal_(0, 0.05 if "embed" in name or "wte" in name else 1.7 * weight.shape[-1] ** -0.5)
                elif "sinks" in name:
                    weight.normal_()
        model.generation_config.eos_token_id = None
        return model

    return make


@pytest.fixture(scope="session")
def stock() -> Callable[..., list[list[int]]]:
    """Return ``run``: ``stock(model, prompts, n)`` gives greedy tokens by ``model.generate``, one prompt at a time."""

    def run(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        out = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            rows = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
            out.append(rows[0, len(prompt) :].tolist())
        return out

    return run


@pytest.fixture(scope="session")
def paged() -> Callable[..., list[list[int]]]:
    """Return ``run``: ``paged(model_or_engine, prompts, n)`` gives greedy tokens by the engine, all prompts at once, in
    small chunks."""

    def run(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        engine = model if isinstance(model, Engine) else small_engine(model)
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, params)
        tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
                tokens[output.request.id] += output.token_ids
        return [tokens[str(index)] for index in range(len(prompts))]

    return run


def small_engine(model: Any, **config: Any) -> Engine:
    settings = {"block_size": 4, "num_blocks": 96, "max_num_seqs": 4, "max_num_batched_tokens": 11,
                "attention_backend": "reference", **config}  # fmt: skip
    return Engine(model, EngineConfig(**settings))


@pytest.fixture
def gate() -> Iterator[Gate]:
    """An open gate, which is opened again when the test ends, so that no server waits for it."""
    gate = Gate()
    gate.open()
    yield gate
    gate.open()


@pytest.fixture(scope="session")
def engine() -> Callable[..., Engine]:
    return small_engine


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (3, 26, 13)]

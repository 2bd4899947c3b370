"""``paged_generate`` against stock over many architectures: a few calls each, of rows longer than the models' windows.

Each model says which tier answers its calls, so that one that quietly falls back makes a test red.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from generate_parity import Options, Recorder, answer, assert_alike, assert_same, some_rows
from paged_hf import paged_generate
from paged_hf.loading.embedded import embedded_folder
from paged_hf.upstream import CACHE, cache_in_result
from rounded_parity import HALVES

ENDS = list(range(5, 96, 9))
FULL: Options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
NO_KV: Options = {"num_key_value_heads": None, "head_dim": None}

FAMILIES: dict[str, Options] = {
    "llama": {},
    "mistral": {},  # a window of 9
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},  # windows and softcaps
    "gemma3_text": {},  # windows in every second layer
    "phi": {"num_key_value_heads": 4, "head_dim": None},
    "phi3": {},
    "mixtral": {},
    "gpt_oss": {},  # sinks
    "olmo2": {},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "granite": {"head_dim": None},
    "smollm3": {"head_dim": None},
    "deepseek_v3": {},  # keys and values of different sizes
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "llama4_text": {},
    "bloom": NO_KV,  # ALiBi
    "falcon": NO_KV,
    "gptj": {**NO_KV, "rotary_dim": 8, "intermediate_size": None, "n_inner": 64},
}
LATENT = ("deepseek_v3",)  # stock's cache keeps something else than attention's K/V
ELSEWHERE: dict[str, tuple[Options, str]] = {  # what the engine can't run, and the tier that does
    "mamba": ({**NO_KV, "state_size": 8}, "stock"),
    "recurrent_gemma": ({"head_dim": None, "lru_width": 48, "attention_window_size": 9}, "stock"),
    "bamba": (
        {"head_dim": None, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 24, "attn_layer_indices": [1, 3]},
        "cache",
    ),
    "cpmant": ({}, "cache"),
}


@dataclass
class Case:
    name: str
    model: Any
    patched: Any
    tier: str
    tier_with_cache: str  # of calls whose cache comes back


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: Any, tiny: Any) -> Iterator[Case]:
    model = tiny(request.param, **FAMILIES[request.param])
    model.generate = paged_generate(model, check=False)
    yield Case(request.param, model, model.generate, "native", "cache" if request.param in LATENT else "native")


def test_greedy_rows(case: Case) -> None:
    ids, mask = some_rows((5, 17, 1, 30, 9, 2, 22, 13), seed=len(case.name))
    for batch_size in (1, 3, 8):
        options = {"attention_mask": mask[:batch_size], "eos_token_id": ENDS, "pad_token_id": 0, "max_new_tokens": 12}
        assert_same(case.patched, ids[:batch_size], **options, tier=case.tier, loop="free")


def test_samples(case: Case) -> None:
    ids, mask = some_rows((5, 30, 13))
    options = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 2, "top_k": 20, "pad_token_id": 0}
    assert_same(case.patched, ids, **options, eos_token_id=ENDS, max_new_tokens=8, tier=case.tier, loop="_sample")
    assert_same(
        case.patched, ids, **options, **FULL, max_new_tokens=5, seed=1, tier=case.tier_with_cache, loop="_sample"
    )


def test_beams(case: Case) -> None:
    ids, mask = some_rows((5, 30, 13))
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    assert_same(case.patched, ids, **options, max_new_tokens=6, tier=case.tier, loop="_beam_search")
    assert_same(case.patched, ids, **options, **FULL, max_new_tokens=6, tier=case.tier_with_cache, loop="_beam_search")


def test_a_processor_with_a_memory_and_a_cache_that_stock_goes_on_from(case: Case) -> None:
    ids, mask = some_rows((5, 30, 13, 8))
    options = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 6, **FULL}

    def fresh() -> Options:
        return {"logits_processor": [Recorder()]}

    ours = assert_same(case.patched, ids, **options, fresh=fresh, tier=case.tier_with_cache, loop="_sample").result
    theirs = answer(case.patched.stock, (ids,), options | fresh()).result
    longer = torch.cat([mask, mask.new_ones(4, 6)], 1)
    again = {"attention_mask": longer, "pad_token_id": 0, "max_new_tokens": 4}
    found = [
        answer(case.patched.stock, (each.sequences,), {**again, CACHE: cache_in_result(each)}).result
        for each in (ours, theirs)
    ]
    assert_alike(found[0], found[1], "continued")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_weights_of_16_bits(name: str, dtype: str, tiny: Any) -> None:
    model = tiny(name).to(HALVES[dtype])
    patched = paged_generate(model, check=False)
    ids, mask = some_rows((5, 17, 1, 30, 9, 22))
    options = {"attention_mask": mask, "pad_token_id": 0}
    sampling = {"do_sample": True, "top_k": 0, **FULL}
    greedy = assert_same(patched, ids, **options, eos_token_id=ENDS, max_new_tokens=8, tier="native", loop="free")
    sampled = assert_same(patched, ids, **options, **sampling, max_new_tokens=5, tier="native", loop="_sample")
    assert_same(patched, ids, **options, num_beams=2, max_new_tokens=3, tier="native", loop="_beam_search")
    assert greedy.num_compared >= 15 and sampled.num_compared >= 20


@pytest.mark.parametrize("name", ELSEWHERE)
def test_models_that_the_engine_cannot_run(name: str, tiny: Any) -> None:
    own, tier = ELSEWHERE[name]
    patched = paged_generate(tiny(name, **own), check=False)
    ids, mask = some_rows((5, 17, 9))
    options = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 5}
    assert_same(patched, ids, **options, eos_token_id=ENDS, tier=tier, loop="_sample")
    assert_same(patched, ids, **options, **FULL, do_sample=True, tier=tier, loop="_sample")
    assert_same(patched, ids, **options, **FULL, num_beams=2, tier=tier, loop="_beam_search")


def test_two_attention_calls_a_layer_and_a_cache_that_comes_back(tiny: Any) -> None:
    patched = paged_generate(tiny("diffllama", head_dim=None), check=False)
    ids, mask = some_rows((5, 17, 9))
    options = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 5}
    assert_same(patched, ids, **options, tier="native", loop="free")
    assert_same(patched, ids, **options, **FULL, use_cache=False, tier="native", loop="_sample")
    assert_same(patched, ids, **options, **FULL, tier="cache", loop="_sample")


def test_token_type_ids(tiny: Any) -> None:
    ids, mask = some_rows((5, 17, 9))
    options = {"attention_mask": mask, "token_type_ids": torch.ones_like(ids), "max_new_tokens": 5}
    assert_same(paged_generate(tiny("gpt2"), check=False), ids, **options, tier="cache", loop="_sample")
    assert_same(paged_generate(tiny("llama"), check=False), ids, **options, tier=None)


def test_dropout_in_training_mode_is_stocks_noise(tiny: Any) -> None:
    noisy = tiny("gpt2", resid_pdrop=0.3).train()
    ids, mask = some_rows((5, 9))
    options = {"attention_mask": mask, "max_new_tokens": 5}
    patched = paged_generate(noisy, check=False)
    assert_same(patched, ids, **options, tier="stock", loop="_sample")
    assert "model.eval()" in patched.last_report().reason
    noisy.eval()
    assert_same(patched, ids, **options, tier="native", loop="free")


def test_encoder_decoder_models_are_stocks() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)
    patched = paged_generate(transformers.T5ForConditionalGeneration(config).eval())
    ids, mask = some_rows((5, 9))
    options = {"attention_mask": mask, "max_new_tokens": 5}
    assert_same(patched, ids, **options, tier="stock", loop="_sample")
    assert_same(patched, ids, **options, **FULL, do_sample=True, tier="stock", loop="_sample")
    assert_same(patched, ids, **options, **FULL, num_beams=2, tier="stock", loop="_beam_search")


def test_images_are_never_computed_by_the_engine() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        text_config=transformers.LlamaConfig(**vision, vocab_size=96),
        image_token_index=95,
    )
    torch.manual_seed(0)
    patched = paged_generate(transformers.LlavaForConditionalGeneration(config).eval())
    ids, mask = some_rows((8, 12, 9))
    ids[:, -5:-1] = 95  # an image of four patches
    options = {"attention_mask": mask, "pixel_values": torch.randn(3, 3, 16, 16), "pad_token_id": 0}
    for mode in ({}, {"num_beams": 2}, {"do_sample": True, **FULL}):
        got = assert_same(patched, ids, **options, **mode, max_new_tokens=5, tier="stock")
        assert got.error is None
    text = ids % 95
    assert_same(patched, text, attention_mask=mask, pad_token_id=0, max_new_tokens=5, tier="native", loop="free")


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> tuple[Any, Options]:
    """SmolLM2 as loaded by its users, self-check included, and two questions in its chat format."""
    folder = embedded_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generate = paged_generate(model)
    assert not model.generate.tiers.dropped
    questions = ("Name three colours.", "What is the capital of France? Answer in one word, without an explanation.")
    messages = [[{"role": "user", "content": question}] for question in questions]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return model.generate, {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@pytest.mark.parametrize(
    ("mode", "loop"),
    [
        ({"do_sample": False}, "free"),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.9}, "_sample"),
        ({"do_sample": False, "repetition_penalty": 1.2, **FULL}, "_sample"),
        ({"do_sample": False, "num_beams": 3, "length_penalty": 0.5, "early_stopping": True}, "_beam_search"),
    ],
    ids=["greedy", "sampled", "scores", "beams"],
)
def test_a_real_chat(chat: tuple[Any, Options], mode: Options, loop: str) -> None:
    patched, prompts = chat
    assert_same(patched, **prompts, **mode, max_new_tokens=8, tier="native", loop=loop)

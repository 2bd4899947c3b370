"""Where options come from, and decoding that is not ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
)

from case_ids import told
from generate_parity import (
    ENDS,
    FULL,
    SHORT,
    Options,
    answer,
    assert_alike,
    assert_same,
    some_rows,
)
from paged_hf import paged_generate
from paged_hf.upstream import CACHE

# ---- configurations --------------------------------------------------------------------------------------------------


def test_generation_config_objects_and_what_overrides_them(patched: Any, own: Any, rows: Options) -> None:
    config = GenerationConfig(max_new_tokens=6, num_beams=3, pad_token_id=0, eos_token_id=ENDS)
    before = config.to_dict()
    assert_same(patched, **rows, generation_config=config, tier="native", loop="_beam_search")
    assert_same(patched, rows["inputs"], config, num_beams=1, attention_mask=rows["attention_mask"], tier="native")
    assert_same(patched, **rows, generation_config=config, num_beams=1, max_new_tokens=3, tier="native", loop="free")
    assert config.to_dict() == before
    own.generation_config.update(do_sample=True, top_k=5, max_new_tokens=4, repetition_penalty=1.3)
    assert_same(patched, **rows, tier="native", loop="_sample")
    assert_same(patched, **rows, do_sample=False, repetition_penalty=1.0, tier="native", loop="free")
    assert_same(patched, **rows, generation_config=config, tier="native", loop="_beam_search")
    own.generation_config.return_dict_in_generate = True
    assert_same(patched, **rows, tier="native", loop="_sample")


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 26},
        {"max_length": 5},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"min_length": 90, "max_length": 40},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
        {"num_beams": 0},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": -1.0, "do_sample": True},
        {"top_p": 1.5, "do_sample": True},
        {"top_k": -3, "do_sample": True},
        {"min_p": 3.0, "do_sample": True},
        {"top_h": 0.0, "do_sample": True},
        {"repetition_penalty": -1.0},
        {"bad_words_ids": []},
        {"sequence_bias": {}},
        {"nobody_knows": 1},
        {"max_new_tokenz": 5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"dola_layers": "low"},
        {"early_stopping": "sometimes", "num_beams": 2},
        {"cache_implementation": "no such cache"},
        {"low_memory": True, "num_beams": 2},
        {"streamer": 3},
        {"token_healing": True},
        {"watermarking_config": {"greenlist_ratio": 7.0}},
        {"forced_eos_token_id": -1},
        {"inputs": None, "attention_mask": None, "bos_token_id": None},
        {"generation_config": {"max_new_tokens": 4}},
        {"logits_processor": [lambda ids: ids]},
        {"stopping_criteria": [lambda ids, scores: True]},
        {"eos_token_id": 41, "pad_token_id": -1},
        {"assistant_model": "none", "num_beams": 2},
        {CACHE: ((1, 2),)},
    ],
    ids=told,
)
def test_mistakes_are_told_as_stock_tells_them(patched: Any, rows: Options, options: Options) -> None:
    options = {"pad_token_id": 0} | rows | options
    expected = answer(patched.stock, (), options)
    got = answer(patched, (), options)
    assert repr(got.error) == repr(expected.error)
    assert got.warnings == expected.warnings
    assert_alike(got.result, expected.result, "result")


def test_arguments_that_do_not_exist_by_position(patched: Any) -> None:
    expected = answer(patched.stock, tuple(range(30)), {})
    assert isinstance(expected.error, TypeError)
    assert repr(answer(patched, tuple(range(30)), {}).error) == repr(expected.error)


# ---- decoding that is not ours ---------------------------------------------------------------------------------------


def test_attentions_and_hidden_states_are_stocks(patched: Any, rows: Options) -> None:
    options = {**rows, **SHORT, "return_dict_in_generate": True}
    assert_same(patched, **options, output_attentions=True, tier="stock", loop="_sample")
    assert_same(patched, **options, output_hidden_states=True, tier="stock", loop="_sample")
    assert_same(patched, **options, output_hidden_states=True, num_beams=2, tier="stock", loop="_beam_search")
    assert_same(patched, **rows, **SHORT, output_hidden_states=True, tier="cache", loop="_sample")


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_lookup(patched: Any, do_sample: bool) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    options = {
        "prompt_lookup_num_tokens": 3,
        "max_new_tokens": 12,
        "pad_token_id": 0,
        "eos_token_id": 95,
        "do_sample": do_sample,
    }
    assert_same(patched, ids, **options, tier="cache", loop="_assisted_decoding")
    assert_same(patched, ids, **options, **FULL, tier="cache", loop="_assisted_decoding")


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("assistant_too", [False, True])
def test_an_assistant_model(patched: Any, tiny: Any, do_sample: bool, assistant_too: bool) -> None:
    assistant = tiny("llama", num_hidden_layers=1, hidden_size=32, seed=4)
    if assistant_too:
        assistant.generate = paged_generate(assistant, check=False)
    ids, mask = some_rows((9,))
    options = {"attention_mask": mask, "assistant_model": assistant, "max_new_tokens": 12, "do_sample": do_sample}
    assert_same(patched, ids, **options, pad_token_id=0, tier="cache", loop="_assisted_decoding")


def test_a_models_own_loop_preparation_and_call_are_honoured(tiny: Any, rows: Options) -> None:
    class Prepares(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
            return inputs | {"input_ids": (inputs["input_ids"] + 1) % 90}

    class Loops(LlamaForCausalLM):
        def _sample(self, input_ids: Any, **kwargs: Any) -> Any:
            return super()._sample(input_ids, **kwargs) + 1

    class Calls(LlamaForCausalLM):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            result.logits = result.logits.flip(-1)
            return result

    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    for kind, tier in ((Prepares, "cache"), (Loops, "native"), (Calls, "native")):
        made.__class__ = kind
        assert_same(paged_generate(made, check=False), **rows, **SHORT, tier=tier, loop=None)


def test_hooks_see_the_batches_that_stock_makes(tiny: Any, rows: Options) -> None:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    patched = paged_generate(made, check=False)
    assert_same(patched, **rows, **SHORT, tier="native", loop="free")
    shapes: list[Any] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        shapes.append(output.shape)
        return output * 0.5

    handle = made.model.layers[0].mlp.register_forward_hook(hook)
    assert_same(patched, **rows, **SHORT, tier="cache", loop="_sample")
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    handle.remove()

    def everywhere(module: Any, args: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(module, torch.nn.Linear) else None

    handle = register_module_forward_hook(everywhere)
    try:
        assert_same(patched, **rows, **SHORT, tier="cache", loop="_sample")
    finally:
        handle.remove()
    assert_same(patched, **rows, **SHORT, tier="native", loop="free")


def test_a_decoding_loop_of_the_callers_own(patched: Any, rows: Options) -> None:
    def mine(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        kwargs.pop("synced_gpus", None)
        for key in ("logits_processor", "stopping_criteria", "generation_config"):
            kwargs.pop(key)
        cache = kwargs.pop(CACHE)
        for _ in range(4):
            new = input_ids if not cache.get_seq_length() else input_ids[:, -1:]
            logits = model(new, **{CACHE: cache}, use_cache=True).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmin(-1, keepdim=True)], 1)
        return input_ids

    ids, _ = some_rows((9, 9))
    assert_same(patched, ids, custom_generate=mine, tier="cache", loop="custom_generate")
    assert_same(patched, ids, custom_generate=type(patched.model)._sample, **SHORT, tier="cache")


def test_a_folder_with_a_decoding_loop(patched: Any, tmp_path: Any) -> None:
    (tmp_path / "custom_generate").mkdir()
    code = "def generate(model, inputs, left=1, **kwargs):\n    return model.generate(inputs, max_new_tokens=left)\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    ids, _ = some_rows((9, 9))
    options = {"custom_generate": str(tmp_path), "left": 4}
    assert_same(patched, ids, **options, trust_remote_code=True, tier="stock", loop="generate")
    assert_same(patched, ids, **options, tier=None)

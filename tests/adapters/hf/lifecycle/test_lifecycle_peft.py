"""PEFT's adapters, however they are put on and turned."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from paged_hf import paged_generate
from patched_calls import GREEDY, MODES, agrees, prompts

# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _lora(model: Any, **adapters: int) -> Any:
    """LoRA adapters that change the answers, each from its own seed."""
    wrapped = None
    for name, seed in adapters.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, weight in wrapped.named_parameters():
                if f"lora_B.{name}" in key:
                    weight.normal_(0, 1)
    assert wrapped is not None
    return wrapped.eval()


def _patch_outside(wrapped: Any) -> None:
    wrapped.generate = paged_generate(wrapped, check=False)


def _patch_inside(wrapped: Any) -> None:
    base = wrapped.get_base_model()
    base.generate = paged_generate(base, check=False)


def _answers(wrapped: Any, tier: str = "native", **options: Any) -> list[list[int]]:
    """Tokens of a patched PEFT model, which are those of a copy that nobody has patched."""
    given = {**prompts(), **GREEDY, **options}
    plain = copy.deepcopy(wrapped)
    for model in (plain, plain.get_base_model()):
        vars(model).pop("generate", None)
    for own in MODES.values():
        got = wrapped.generate(**given, **own)
        taken = paged_generate.last_report()  # type: ignore[attr-defined]
        assert taken.tier == tier, taken
        assert torch.equal(got, plain.generate(**given, **own))
    return got.tolist()


@pytest.mark.parametrize("patch", [_patch_outside, _patch_inside])
def test_lora_adapters_are_honoured_however_they_are_turned(make: Any, patch: Any) -> None:
    wrapped = _lora(make(), first=1, second=2)
    patch(wrapped)
    seen = [_answers(wrapped)]
    with wrapped.disable_adapter():
        seen.append(_answers(wrapped))
    assert _answers(wrapped) == seen[0]
    wrapped.set_adapter("second")
    seen.append(_answers(wrapped))
    wrapped.set_adapter("first")
    assert _answers(wrapped) == seen[0]
    wrapped.merge_adapter()
    assert _answers(wrapped) == seen[0]
    wrapped.unmerge_adapter()
    assert _answers(wrapped) == seen[0]
    with torch.no_grad():
        wrapped.get_base_model().model.layers[0].self_attn.q_proj.lora_B["first"].weight.mul_(-3)
    seen.append(_answers(wrapped))
    wrapped.delete_adapter("second")
    assert _answers(wrapped) == seen[-1]
    assert len({str(answer) for answer in seen}) == 4, "an adapter changes nothing: it proves nothing"


def test_lora_weights_in_training_are_honoured(make: Any) -> None:
    wrapped = _lora(make(), first=1)
    _patch_outside(wrapped)
    wrapped.enable_input_require_grads()
    optimizer = torch.optim.SGD([w for w in wrapped.parameters() if w.requires_grad], lr=2.0)
    seen = []
    for _ in range(3):
        wrapped.train()
        wrapped(**prompts(3), labels=prompts(3)["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.eval()
        seen.append(str(_answers(wrapped)))
    assert len(set(seen)) == 3


def test_an_adapter_for_each_row_is_stocks(make: Any) -> None:
    wrapped = _lora(make(), first=1, second=2)
    before = copy.deepcopy(wrapped)
    _patch_outside(wrapped)
    given = {**prompts(), **GREEDY, "adapter_names": ["first", "__base__", "second"]}
    assert torch.equal(wrapped.generate(**given), before.generate(**given))
    assert wrapped.generate.last_report().tier == "stock"
    _answers(wrapped)


def test_a_merged_and_unloaded_model_is_patched_like_any_other(make: Any) -> None:
    wrapped = _lora(make(), first=1)
    _patch_outside(wrapped)
    with_adapter = _answers(wrapped)
    merged = wrapped.merge_and_unload()
    merged.generate = paged_generate(merged, check=False)
    agrees(merged)
    assert merged.generate(**prompts(), **GREEDY, num_beams=2).tolist() == with_adapter


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning")  # PEFT 0.21 on 5.24
def test_virtual_tokens_are_stocks(make: Any, kind: Any) -> None:
    wrapped = peft.get_peft_model(make(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    given = {**prompts(), **GREEDY}
    expected = copy.deepcopy(wrapped).generate(**given)
    wrapped.generate = paged_generate(wrapped)
    assert torch.equal(wrapped.generate(**given), expected)
    assert wrapped.generate.last_report().tier == "stock"
    with wrapped.disable_adapter():
        plain = wrapped.get_base_model()
        assert torch.equal(wrapped.generate(**given), type(plain).generate(plain, **given))

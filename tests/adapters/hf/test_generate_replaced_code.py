"""Code that is replaced between two calls, forwards that look at the batch, models that keep a state: what answers."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from changed_models import GREEDY, MODES, SMALL, agrees, hold, prompts
from paged_core import UnsupportedModel
from paged_hf import paged_generate
from paged_hf.model.paged_model import HFPagedModel

# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama", **SMALL)


def llamas_mlp(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: -own(self, x))


def torchs_linear(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, -self.weight.abs(), self.bias))


def torchs_function(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = nn.functional.linear
    patch.setattr(nn.functional, "linear", lambda x, weight, bias=None: own(x, -weight.abs(), bias))


def _half_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    return q * cos[:, None], k * cos[:, None]


def rotary(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", _half_turned)


def what_rotary_calls(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "rotate_half", lambda x: x)


def the_class_of_a_module(model: Any, patch: pytest.MonkeyPatch) -> None:
    class Negated(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model.model.layers[0].mlp.__class__ = Negated


def the_code_of_a_method(model: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return -self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    patch.setattr(modeling_llama.LlamaMLP.forward, "__code__", forward.__code__)


def a_method_that_is_new(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = nn.Module.__call__
    kind = modeling_llama.LlamaMLP
    patch.setattr(kind, "__call__", lambda self, x: -own(self, x), raising=False)


REPLACED = [
    llamas_mlp, torchs_linear, torchs_function, rotary, what_rotary_calls, the_class_of_a_module, the_code_of_a_method,
    a_method_that_is_new,
]  # fmt: skip


@pytest.mark.parametrize("replace", REPLACED, ids=lambda replace: replace.__name__)
def test_the_next_call_runs_code_that_replaced(replace: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.generate = paged_generate(model, check=False)
    before = agrees(model)
    with monkeypatch.context() as patch:
        replace(model, patch)
        assert agrees(model) != before, "the change changes nothing: it proves nothing"
    if replace is not the_class_of_a_module:
        assert agrees(model) == before


def _negated(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **facts: Any) -> Any:
    return sdpa_attention_forward(module, query, key, -value, mask, **facts)


def test_attention_of_the_users_own_is_honoured_when_it_is_chosen(model: Any) -> None:
    AttentionInterface.register("negated", _negated)
    model.generate = paged_generate(model, check=False)
    before = agrees(model)
    model.set_attn_implementation("negated")
    assert agrees(model, "cache") != before
    model.set_attn_implementation("sdpa")
    assert agrees(model) == before


def test_attention_of_the_users_own_is_honoured_when_it_is_registered(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.generate = paged_generate(model, check=False)
    before = agrees(model)
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", _negated)
        assert agrees(model, "cache") != before
    assert agrees(model) == before


def test_layer_types_of_a_config_are_honoured(tiny: Any) -> None:
    model = tiny("gemma3_text", **SMALL, layer_types=["full_attention", "sliding_attention"])
    model.generate = paged_generate(model, check=False)
    before = agrees(model)
    model.config.layer_types[0] = "sliding_attention"
    for name in ("layer_type", "attention_type"):
        for part in (model.model.layers[0], model.model.layers[0].self_attn):
            if hasattr(part, name):
                setattr(part, name, "sliding_attention")
    model.model.layers[0].self_attn.sliding_window = 9
    agrees(model)
    assert before


def test_a_change_undone_and_an_equal_value_set_anew_keep_what_is_cached(model: Any) -> None:
    mlp = hold(model, lambda self: self.scales["default"], scales={"default": 1.5})
    model.generate = paged_generate(model, check=False)
    agrees(model)
    taken = model.generate.tiers.host.paged_model.shadow  # made anew when anything has changed
    mlp.scales["default"] = float("1.5")
    mlp.train()
    mlp.eval()
    agrees(model)
    assert model.generate.tiers.host.paged_model.shadow is taken


def one_logit_of_the_last_token(owner: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    output.logits[:, -1, 42] += 3
    return output


def last_token(owner: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs).clone()
    output[:, -1] += 5
    return output


def first_row(owner: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs).clone()
    output[0] *= -1
    return output


ACTING = [("", one_logit_of_the_last_token), ("lm_head", last_token), ("model.layers.1.mlp", last_token),
          ("model.layers.0.mlp", first_row)]  # fmt: skip


names_of_acts = pytest.mark.parametrize(("name", "act"), ACTING, ids=lambda part: getattr(part, "__name__", part))


@names_of_acts
@pytest.mark.parametrize("first", ["patched", "replaced"])
def test_a_replaced_forward_sees_stocks_batches(model: Any, name: str, act: Any, first: str) -> None:
    module = model.get_submodule(name)
    if first == "patched":
        model.generate = paged_generate(model, check=False)
        agrees(model)
    module.forward = functools.partial(act, module, module.forward)
    model.generate = paged_generate(model, check=False)
    agrees(model, "cache")
    del module.forward
    agrees(model)


@names_of_acts
def test_a_class_whose_forward_acts_on_rows_is_not_run_by_the_engine(model: Any, name: str, act: Any) -> None:
    module = model.get_submodule(name)
    kind = type(module)

    @functools.wraps(kind.forward)  # its arguments are looked at
    def acting(self: Any, *args: Any, **kwargs: Any) -> Any:
        return act(self, functools.partial(kind.forward, self), *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"forward": acting})
    model.generate = paged_generate(model, check=False)
    agrees(model, "cache")
    with pytest.raises(UnsupportedModel, match="its logits differ"):
        HFPagedModel(model)


def test_one_logit_of_a_large_vocabulary_is_seen(tiny: Any) -> None:
    """It moves the mean of all by a fortieth of what rounding may."""
    model = tiny("llama", **SMALL, vocab_size=20_000)
    own = type(model).forward

    @functools.wraps(own)  # its arguments are looked at
    def steered(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits[:, -1, 42] += output.logits.std() / 2
        return output

    model.__class__ = type("Steered", (type(model),), {"forward": steered})
    with pytest.raises(UnsupportedModel, match="its logits differ"):
        HFPagedModel(model)


def test_another_classs_forward_on_an_instance_is_run_by_the_engine(model: Any) -> None:
    """As libraries of kernels put it there."""
    norm = model.model.norm
    norm.forward = types.MethodType(LlamaLikeNorm.forward, norm)
    model.generate = paged_generate(model, check=False)
    agrees(model)


class LlamaLikeNorm(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe"])
def test_a_model_with_convolutions_is_known_by_its_cache(tiny: Any, kind: str) -> None:
    own: dict[str, Any] = {"layer_types": ["conv", "full_attention"], "head_dim": None}
    if kind == "lfm2_moe":
        own |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
    model = tiny(kind, **{**SMALL, **own})
    model.generate = paged_generate(model, check=False)
    agrees(model, "cache")
    for more in MODES.values():
        given = {**prompts(), **GREEDY, **more, "return_dict_in_generate": True}
        assert torch.equal(model.generate(**given).sequences, model.generate.stock(**given).sequences)
    with pytest.raises(UnsupportedModel, match="conv_states"):
        HFPagedModel(model)

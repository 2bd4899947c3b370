"""What a forward reads besides weights, changed between two calls: the next call answers as stock would then."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from paged_core import UnsupportedModel
from paged_hf import paged_generate
from paged_hf.model.paged_model import HFPagedModel

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
MODES: dict[str, dict[str, Any]] = {"free": {}, "lockstep": {"num_beams": 2}}
# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SCALE = [1.0]  # a global of this module, which a forward below reads

Turn = Callable[[], object]
"""Changes the model once more."""


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama", **SMALL)


@pytest.fixture(autouse=True)
def scale_is_one() -> Iterator[None]:
    SCALE[0] = 1.0
    yield


def prompts() -> dict[str, Tensor]:
    """Three equal-sized rows with a beginning in common, as long as several blocks."""
    ids = torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[1:, :36] = ids[0, :36]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def agrees(model: Any, tier: str | None = "native") -> list[list[int]]:
    """Free and lockstep calls give the tokens of the model as it is now."""
    given = {**prompts(), **GREEDY}
    for mode, own in MODES.items():
        got = model.generate(**given, **own)
        taken = paged_generate.last_report()  # type: ignore[attr-defined]
        assert tier in (None, taken.tier), (mode, taken)
        assert torch.equal(got, model.generate.stock(**given, **own)), mode
    return model.generate(**given).tolist()


class Reading(nn.Module):
    """Gives what ``inner`` gives, times what ``factor(self)`` reads."""

    def __init__(self, inner: nn.Module, factor: Callable[[Any], Any], **held: Any) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor(self)


def hold(model: Any, factor: Callable[[Any], Any], **held: Any) -> Any:
    layer = model.model.layers[0]
    layer.mlp = Reading(layer.mlp, factor, **held)
    return layer.mlp


class Knob:
    """A plain object."""

    kind = 1.0  # of all of them

    def __init__(self) -> None:
        self.turn = 1.0


class Slotted:
    __slots__ = ("turn",)

    def __init__(self) -> None:
        self.turn = 1.0


@dataclass
class Settings:
    knobs: list[Knob]


class Callable_:
    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, module: Any) -> float:
        return self.factor


def _lora(model: Any) -> tuple[Any, Any]:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    layers = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return wrapped, layers


# ---- each of these changes something that isn't a weight -----------------------------------------------------------


def a_dict_entry(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.scales["default"], scales={"default": 1.0})
    return lambda: mlp.scales.update(default=-mlp.scales["default"])


def a_list_item(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.scales[1], scales=[0.0, 1.0])
    return lambda: mlp.scales.__setitem__(1, -mlp.scales[1])


def a_list_in_a_dict_in_a_tuple(model: Any) -> Turn:
    inner = [1.0]
    hold(model, lambda self: self.deep[0]["a"][0], deep=({"a": inner},))
    return lambda: inner.__setitem__(0, -inner[0])


def a_set(model: Any) -> Turn:
    mlp = hold(model, lambda self: -1.0 if "on" in self.flags else 1.0, flags={"off"})
    return lambda: mlp.flags.symmetric_difference_update({"on"})


def a_deque(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.line[0], line=deque([1.0, -1.0]))
    return lambda: mlp.line.rotate(1)


def a_tensor_in_place(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.scales[0], scales=[torch.ones(32)])
    return lambda: mlp.scales[0].mul_(-1)


def a_tensor_through_data(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.held["scale"], held={"scale": torch.ones(32)})
    return lambda: mlp.held["scale"].data.mul_(-1)


def a_numpy_array(model: Any) -> Turn:
    mlp = hold(model, lambda self: torch.from_numpy(self.array), array=np.ones(32, dtype=np.float32))
    return lambda: mlp.array.__imul__(-1)


def an_objects_attribute(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.settings.knobs[0].turn, settings=Settings([Knob()]))
    return lambda: setattr(mlp.settings.knobs[0], "turn", -mlp.settings.knobs[0].turn)


def a_slot_of_an_object(model: Any) -> Turn:
    mlp = hold(model, lambda self: self.knob.turn, knob=Slotted())
    return lambda: setattr(mlp.knob, "turn", -mlp.knob.turn)


def an_attribute_of_an_objects_class(model: Any) -> Turn:
    kind = type("Kind", (Knob,), {"kind": 1.0})
    hold(model, lambda self: self.knob.kind, knob=kind())
    return lambda: setattr(kind, "kind", -kind.kind)  # type: ignore[attr-defined]


def an_attribute_of_a_namespace(model: Any) -> Turn:
    space = types.SimpleNamespace(turn=1.0)
    hold(model, lambda self: self.space.turn, space=space)
    return lambda: setattr(space, "turn", -space.turn)


def a_closures_dict(model: Any) -> Turn:
    state = {"a": 1.0}
    hold(model, lambda self: state["a"])
    return lambda: state.update(a=-state["a"])


def a_closures_variable(model: Any) -> Turn:
    factor = 1.0

    def turn() -> None:
        nonlocal factor
        factor = -factor

    hold(model, lambda self: factor)
    return turn


def a_partials_argument(model: Any) -> Turn:
    state = [1.0]
    hold(model, functools.partial(lambda held, self: held[0], state))
    return lambda: state.__setitem__(0, -state[0])


def a_callable_objects_attribute(model: Any) -> Turn:
    factor = Callable_()
    hold(model, factor)
    return lambda: setattr(factor, "factor", -factor.factor)


def a_default_of_a_function(model: Any) -> Turn:
    def factor(self: Any, by: float = 1.0) -> float:
        return by

    hold(model, factor)
    return lambda: setattr(factor, "__defaults__", (-(factor.__defaults__ or (1.0,))[0],))


def a_functions_code(model: Any) -> Turn:
    def factor(self: Any) -> float:
        return 1.0

    def other(self: Any) -> float:
        return -1.0

    codes = [other.__code__, factor.__code__]
    hold(model, factor)

    def turn() -> None:
        codes.reverse()
        factor.__code__ = codes[1]

    return turn


def a_global_variable(model: Any) -> Turn:
    hold(model, lambda self: SCALE[0])
    return lambda: SCALE.__setitem__(0, -SCALE[0])


def a_class_attribute(model: Any) -> Turn:
    kind = type("ReadingOwn", (Reading,), {"sign": 1.0})
    layer = model.model.layers[0]
    layer.mlp = kind(layer.mlp, lambda self: self.sign)
    return lambda: setattr(kind, "sign", -kind.sign)  # type: ignore[attr-defined]


def a_weight_of_a_module_in_a_list(model: Any) -> Turn:
    line = nn.Linear(32, 32)
    hold(model, lambda self: self.lines[0].bias, lines=[line])
    with torch.no_grad():
        line.bias.fill_(1)
    return lambda: line.bias.data.mul_(-1)


def loras_scale(model: Any) -> Turn:
    _, layers = _lora(model)
    scales = iter((6, 0.1, 3))

    def turn() -> None:
        scale = next(scales)
        for layer in layers:
            layer.set_scale("default", scale)

    return turn


def loras_scaling_entry(model: Any) -> Turn:
    _, layers = _lora(model)

    def turn() -> None:
        for layer in layers:
            layer.scaling["default"] *= -4

    return turn


def a_list_in_a_config(model: Any) -> Turn:
    model.config.signs = [[1.0]]
    hold(model, lambda self: model.config.signs[0][0])
    return lambda: model.config.signs[0].__setitem__(0, -model.config.signs[0][0])


def an_entry_beside_a_counter(model: Any) -> Turn:
    state = {"calls": 0, "a": 1.0}
    calls: list[int] = []

    def factor(self: Any) -> float:
        state["calls"] += 1
        calls.append(1)
        return state["a"]

    hold(model, factor)
    return lambda: state.update(a=-state["a"])


CHANGES: list[Callable[[Any], Turn]] = [
    a_dict_entry, a_list_item, a_list_in_a_dict_in_a_tuple, a_set, a_deque, a_tensor_in_place, a_tensor_through_data,
    a_numpy_array, an_objects_attribute, a_slot_of_an_object, an_attribute_of_an_objects_class,
    an_attribute_of_a_namespace, a_closures_dict, a_closures_variable, a_partials_argument,
    a_callable_objects_attribute, a_default_of_a_function, a_functions_code, a_global_variable, a_class_attribute,
    a_weight_of_a_module_in_a_list, loras_scale, loras_scaling_entry, a_list_in_a_config,
    an_entry_beside_a_counter,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_call_sees(change: Callable[[Any], Turn], model: Any) -> None:
    turn = change(model)
    model.generate = paged_generate(model, check=False)
    before = agrees(model)
    turn()
    after = agrees(model)
    assert after != before, "the change changes nothing: it proves nothing"
    turn()
    assert agrees(model) != after


def test_the_closure_of_a_replaced_forward_may_change(model: Any) -> None:
    state, mlp = {"a": 0.0}, model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + state["a"]
    model.generate = paged_generate(model, check=False)
    before = agrees(model, None)
    state["a"] = 0.7
    assert agrees(model, None) != before


# ---- code that is replaced on classes and in registries ------------------------------------------------------------


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


# ---- forwards that look at the batch -------------------------------------------------------------------------------


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


# ---- state that is no attention's ----------------------------------------------------------------------------------


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

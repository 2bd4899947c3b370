"""What a forward reads besides weights, changed between two calls: the next call answers as stock would then."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from changed_models import SMALL, Reading, agrees, hold
from paged_hf import paged_generate

# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


SCALE = [1.0]  # a global of this module, which a forward below reads


Turn = Callable[[], object]


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama", **SMALL)


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

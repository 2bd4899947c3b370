"""Forwards that stand in for a CPU's modules: the same answers, whatever is done to the module meanwhile."""

import threading

import pytest
import torch
from torch import nn

from modules_to_accelerate import (
    DTYPES,
    TOLERANCE,
    Attention,
    Conv1D,
    GatedMLP,
    GemmaNorm,
    LlamaNorm,
    accelerate,
    ask,
)
from paged_core.builtin.forwards import create_module_forward


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.inference_mode()
def same(forward, module, x):
    torch.testing.assert_close(forward(x), module(x), atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(48, 64), (33, 7), (576, 100)])
def test_a_linear_layer_gives_the_same_answers(inputs, outputs, bias, dtype):
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    forward = ask(linear)
    for shape in ((inputs,), (1, inputs), (5, inputs), (1, 70, inputs), (2, 3, inputs), (0, inputs)):
        assert same(forward, linear, torch.randn(shape).to(dtype))


@pytest.mark.parametrize(
    "module", [GatedMLP(), GatedMLP(bias=True), Conv1D(64, 48), LlamaNorm(48), GemmaNorm(48), nn.RMSNorm(48, eps=1e-6)]
)
def test_other_modules_give_the_same_answers(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    forward = ask(module)
    for shape in ((1, 48), (1, 70, 48), (2, 3, 48)):
        assert same(forward, module, torch.randn(shape))


@pytest.mark.parametrize("module", [GatedMLP(), LlamaNorm(48)])
def test_bfloat16_modules_give_the_same_answers_within_its_rounding(module):
    module.to(torch.bfloat16)
    assert same(ask(module), module, torch.randn(1, 9, 48).bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_one_input_agree_when_called_in_turn(bias):
    attention = Attention(bias)
    forwards = accelerate(attention)
    for rows in (1, 3, 20):
        x = torch.randn(1, rows, 48)
        assert len(forwards) == 3
        for module, forward in forwards.items():
            assert same(forward, module, x)


def test_projections_agree_in_any_order_on_any_inputs_and_when_called_again():
    attention = Attention()
    q, k, v = attention.children()
    fast = accelerate(attention)
    x, y = torch.randn(4, 48), torch.randn(4, 48)
    for module, given in ((k, x), (v, x), (q, x), (k, y), (k, x), (k, x), (q, x), (q, y), (k, x), (v, y), (v, y)):
        assert same(fast[module], module, given)


def test_an_input_that_is_written_to_between_two_projections_is_read_again():
    attention = Attention()
    q, k, _ = attention.children()
    fast, x = accelerate(attention), torch.randn(4, 48)
    with torch.no_grad():
        fast[q](x)
        x.mul_(2)
        torch.testing.assert_close(fast[k](x), k(x))


def test_two_threads_may_run_the_same_projections():
    attention = Attention()
    fast = list(accelerate(attention).items())
    wrong = []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(3, 48, generator=generator)
            with torch.no_grad():
                wrong.extend(seed for module, forward in fast if not torch.allclose(forward(x), module(x), atol=1e-5))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_place(p):
    with torch.no_grad():
        p.add_(0.5)


def through_data(p):
    p.data.mul_(-1.5)


CHANGES = {
    "in place": lambda module: [in_place(p) for p in module.parameters()],
    "loaded": lambda module: module.load_state_dict({k: v * 2 + 1 for k, v in module.state_dict().items()}),
    "replaced": lambda module: [
        setattr(part, name, nn.Parameter(p.detach() * 3))
        for part in module.modules()
        for name, p in list(part._parameters.items())
        if p is not None
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [lambda: nn.Linear(48, 64), GatedMLP, lambda: Conv1D(64, 48), lambda: LlamaNorm(48),
                                  lambda: GemmaNorm(48), Attention])  # fmt: skip
def test_a_changed_weight_is_honoured_at_the_next_call(make, change):
    module, x = make(), torch.randn(3, 48)
    fast = accelerate(module)
    assert not any(forward.stale() for forward in fast.values())
    CHANGES[change](module)
    assert all(forward.stale() for forward in fast.values())
    for part, forward in fast.items():
        assert same(forward, part, x)


@pytest.mark.parametrize("make", [lambda: nn.Linear(48, 64), GatedMLP, lambda: LlamaNorm(48), Attention])
def test_an_edit_through_data_is_seen_when_asked_for_and_the_next_forward_has_it(make):
    module, x = make(), torch.randn(3, 48)
    fast = accelerate(module)
    for parameter in module.parameters():
        through_data(parameter)
    assert all(forward.stale() for forward in fast.values())
    for part in fast:
        assert same(ask(part), part, x)


def test_a_parameter_of_another_dtype_or_kind_falls_back_to_the_module():
    linear, mlp, norm = nn.Linear(48, 64), GatedMLP(), LlamaNorm(48)
    fast = [ask(linear), ask(mlp), ask(norm)]
    for module, forward in zip((linear, mlp, norm), fast, strict=True):
        module.double()
        x = torch.randn(3, 48).double()
        torch.testing.assert_close(forward(x), module(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: type("Own", (nn.Linear,), {})(48, 64),
        lambda: nn.Linear(48, 64).half(),
        lambda: nn.Linear(48, 64, device="meta"),
        lambda: nn.LayerNorm(48),
        lambda: nn.Embedding(10, 48),
        lambda: GatedMLP(act=nn.GELU),
    ],
)
def test_what_is_not_plainly_understood_is_left_alone(make):
    assert ask(make()) is None


def test_a_weight_that_is_a_tensor_of_another_class_is_left_alone():
    class Quantised(torch.Tensor):
        pass

    linear, mlp = nn.Linear(48, 64), GatedMLP()
    for part in (linear, mlp.up_proj):
        part.weight = nn.Parameter(part.weight.detach().as_subclass(Quantised))
    assert ask(linear) is None and ask(mlp) is None and ask(mlp.up_proj) is None


def test_a_norm_of_another_formula_is_left_alone():
    class Scaled(LlamaNorm):
        def forward(self, x):
            return super().forward(x) * 1.01

    class Centred(LlamaNorm):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    assert ask(Scaled(48)) is None and ask(Centred(48)) is None


def test_a_gated_mlp_of_another_formula_is_left_to_its_linears():
    class Doubled(GatedMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp = Doubled()
    fast = accelerate(mlp)
    assert set(fast) == {mlp.gate_proj, mlp.up_proj, mlp.down_proj}


def test_a_hook_inside_an_mlp_still_runs_whenever_it_was_added():
    early, late, seen = GatedMLP(), GatedMLP(), []
    early.up_proj.register_forward_hook(lambda *_: seen.append("early"))
    assert ask(early) is None
    forward = ask(late)
    late.up_proj.register_forward_hook(lambda module, args, out: out * 0 if seen.append("late") is None else None)
    with torch.no_grad():
        assert not forward(torch.randn(2, 48)).any()
    assert seen == ["late"]


def test_a_child_that_was_swapped_makes_an_mlp_stale():
    mlp = GatedMLP()
    forward = ask(mlp)
    mlp.up_proj = nn.Linear(48, 100)
    assert forward.stale()


def test_a_wrapped_projection_keeps_its_siblings_apart():
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    attention = Attention()
    attention.k_proj = Wrapper(attention.k_proj)
    fast, x = accelerate(attention), torch.randn(2, 48)
    assert set(fast) == {attention.q_proj, attention.k_proj.base, attention.v_proj}
    for module, forward in fast.items():
        assert same(forward, module, x)


def test_nothing_of_the_users_module_or_of_his_random_numbers_is_touched():
    mlp, attention = GatedMLP(), Attention()
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in mlp.named_parameters()}
    kept, state = {m: dict(m.__dict__) for m in (*mlp.modules(), *attention.modules())}, torch.get_rng_state()
    accelerate(mlp), accelerate(attention)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in mlp.named_parameters():
        address, version, values = before[name]
        assert (p.data_ptr(), p._version) == (address, version) and torch.equal(p, values)
    assert all(vars(module) == old for module, old in kept.items())


def test_other_devices_are_not_ours():
    assert create_module_forward(nn.Linear(4, 4), torch.device("meta")) is None


def test_an_engine_over_a_model_that_is_gone_leaves_no_packed_weights_behind():
    import gc
    import weakref

    gc.disable()
    try:
        module = Attention()
        for part, forward in accelerate(module).items():
            part.__dict__["forward"] = forward  # as a model adapter does with its own copy of the tree
        packed = weakref.ref(module.q_proj.forward._layers)
        del module, part, forward
        assert packed() is None
    finally:
        gc.enable()

"""Products of bfloat16, each by the instructions that it is written for. What a host lacks is compiled all the same,
for a processor that has it, and the instruction looked for in the machine code. The first test tells what ran."""

import llvmlite.binding as llvm
import pytest
import torch
from torch.nn.functional import linear, silu

from machine_code import machine_code
from paged_kernels.cpu import amx, dot_bf16, fma, host
from paged_kernels.cpu.linear import PackedLinear
from paged_kernels.cpu.passes import emit_pass

RUNNABLE = [product for product in host.BF16 if host.can_run(product)]
products = pytest.mark.parametrize("product", RUNNABLE, ids=lambda product: product.name)
ROUNDING = 2.0**-24  # of float32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_the_host_has_a_product_and_takes_the_first_that_is_worth_it(capsys):
    with capsys.disabled():
        names = ", ".join(product.name for product in RUNNABLE)
        print(f"\nbfloat16 on {llvm.get_host_cpu_name()}: can run {names}; takes {host.choose(torch.bfloat16).name}")
    assert fma.WIDENED in RUNNABLE and host.choose(torch.bfloat16) in RUNNABLE
    assert PackedLinear([draw(3, 4)], [None]).product is host.choose(torch.bfloat16)


@pytest.mark.parametrize(
    "features, name, chosen",
    [
        ({"amx-tile", "amx-bf16", "avx512f", "avx512bf16"}, "emeraldrapids", "amx_bf16"),
        ({"avx512f", "avx512bf16"}, "znver4", "avx512_bf16"),
        ({"avx512f", "avx512bf16"}, "emeraldrapids", "fma"),  # a host that keeps its tiles to itself
        ({"avx512f"}, "icelake-server", "fma"),
        (set(), "haswell", "fma"),
    ],
)
def test_what_is_chosen_follows_from_what_the_processor_has(features, name, chosen, monkeypatch):
    monkeypatch.setattr(host, "has", lambda *wanted: set(wanted) <= features)
    monkeypatch.setattr(host, "_tiles_are_permitted", lambda: True)
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: name)
    assert host.choose(torch.bfloat16).name == chosen
    assert host.choose(torch.float32).name == "fma"


def test_tiles_that_the_system_does_not_permit_are_not_used(monkeypatch):
    monkeypatch.setattr(host, "_tiles_are_permitted", lambda: False)
    assert host.choose(torch.bfloat16) is not amx.AMX
    with pytest.raises(ValueError, match=r"'amx_bf16'.*can't compute.*on this host"):
        PackedLinear([draw(3, 4)], [None], product=amx.AMX)


def test_a_product_for_other_weights_is_refused():
    with pytest.raises(ValueError, match=r"'fma' for weights of torch\.float32 can't compute"):
        PackedLinear([draw(3, 4)], [None], product=fma.FLOAT32)


@products
@pytest.mark.parametrize("columns, depth", [(1, 1), (7, 3), (33, 32), (48, 192), (49, 193), (200, 500), (96, 1536)])
def test_sums_are_those_of_the_rounded_inputs_within_float32(columns, depth, product):
    weight, bias = draw(columns, depth), draw(columns, seed=1)
    packed = PackedLinear([weight], [bias], product=product)
    for rows in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130, 257):
        x = draw(rows, depth, seed=rows)
        ours, truth = packed(x, torch.float32), linear(x.double(), weight.double(), bias.double())
        sizes = linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        assert ours.dtype is torch.float32
        assert ((ours - truth).abs() <= ROUNDING * (depth + 2) * sizes).all(), rows
        assert torch.equal(packed(x), ours.bfloat16())


@products
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_on_any_number_of_threads(gated, product):
    packed = PackedLinear([draw(100, 300, seed=i) for i in range(2)], [None, None], gated, product)
    x = draw(600, 300, seed=5)
    whole, threads = packed(x, torch.float32), torch.get_num_threads()
    for rows in [*range(1, 131), 193, 257, 513]:
        assert torch.equal(packed(x[:rows], torch.float32), whole[:rows]), rows
        assert torch.equal(packed(x[-rows:], torch.float32), whole[-rows:]), rows
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(packed(x, torch.float32), whole)
    finally:
        torch.set_num_threads(threads)


@products
def test_no_number_is_read_beyond_the_rows_and_none_written_beyond_the_result(product):
    weight = draw(40, 70)
    packed = PackedLinear([weight], [None], product=product)
    for rows in (1, 5, 17, 33, 65):
        wide = torch.full((rows + 2, 90), float("nan"), dtype=torch.bfloat16)
        wide[1:-1, 10:80] = draw(rows, 70, seed=rows)
        x = wide[1:-1, 10:80]
        assert torch.equal(packed(x, torch.float32), packed(x.contiguous(), torch.float32))
        assert packed(x).isfinite().all()


@products
def test_several_layers_and_gated_pairs_come_out_as_one_by_one(product):
    one, two, bias, x = draw(70, 200), draw(70, 200, seed=1), draw(70, seed=2), draw(3, 5, 200, seed=3) / 14
    a, b = linear(x.double(), one.double()), linear(x.double(), two.double(), bias.double())
    both = PackedLinear([one, two], [None, bias], product=product)(x, torch.float32)
    gate = PackedLinear([one, two], [None, bias], gated=True, product=product)(x, torch.float32)
    torch.testing.assert_close(both.double(), torch.cat([a, b], -1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gate.double(), silu(a) * b, atol=1e-5, rtol=1e-5)


@products
@pytest.mark.parametrize("columns", [48, 50, 96])
def test_a_residual_is_added_to_the_rounded_result_as_a_module_would_add_it(columns, product):
    packed = PackedLinear([draw(columns, 70)], [draw(columns, seed=1)], product=product)
    for rows in (1, 7, 33, 100):
        x, residual = draw(2, rows, 70, seed=rows), draw(2, rows, columns, seed=rows + 1)
        assert torch.equal(packed(x, residual=residual), packed(x) + residual)
        apart = draw(2, rows, columns + 3, seed=9)[..., 3:]
        assert torch.equal(packed(x, residual=apart), packed(x) + apart)
        assert torch.equal(packed(x, torch.float32, residual), packed(x, torch.float32) + residual)


@products
def test_float32_rows_are_rounded_where_the_instructions_take_bfloat16(product):
    weight, x = draw(40, 64), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    packed = PackedLinear([weight], [None], product=product)
    seen = x if packed.x_dtype is torch.float32 else x.bfloat16()
    torch.testing.assert_close(packed(x).double(), linear(seen.double(), weight.double()), atol=1e-5, rtol=1e-5)


@products
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_passes_through_to_its_own_row_or_column_only(value, product):
    weight, x = draw(96, 64).abs() + 1, draw(20, 64).abs() + 1
    x[3, 5] = value
    out = PackedLinear([weight], [None], product=product)(x)
    assert torch.equal(out[3].float().nan_to_num(9), torch.full((96,), value).nan_to_num(9))
    assert out[[i for i in range(20) if i != 3]].isfinite().all()
    x[3, 5], weight[7, 9] = 1, value
    out = PackedLinear([weight], [None], product=product)(x)
    assert not out[:, 7].isfinite().any() and out[:, [i for i in range(96) if i != 7]].isfinite().all()


@products
def test_denormal_numbers_are_taken_for_zero_by_the_instructions_that_do(product):
    weight, x = torch.full((32, 32), 2.0**-130).bfloat16(), torch.full((4, 32), 2.0**100).bfloat16()
    out = PackedLinear([weight], [None], product=product)(x, torch.float32)
    assert torch.equal(out, torch.full((4, 32), 0.0 if product is not fma.WIDENED else 32 * 2.0**-30))


@products
def test_weights_may_begin_anywhere_and_lie_turned(product):
    storage, x = draw(40 * 64 + 3, seed=4), draw(9, 64, seed=5)
    for weight in (storage[3:].view(40, 64), storage[1:-2].view(64, 40).t(), storage[: 40 * 64].view(40, 64)[:, 1:]):
        x_part = x[:, : weight.shape[1]]
        ours = PackedLinear([weight], [None], product=product)(x_part, torch.float32)
        torch.testing.assert_close(ours.double(), linear(x_part.double(), weight.double()), atol=1e-5, rtol=1e-5)


def test_stock_products_that_use_tiles_too_go_on_working_between_ours():
    weight, x = draw(96, 64), draw(33, 64, seed=1)
    packed, stock = PackedLinear([weight], [None]), linear(x, weight)
    ours = packed(x)
    for _ in range(3):
        assert torch.equal(linear(x, weight), stock)
        assert torch.equal(packed(x), ours)


# ---- compiled for processors that have the instructions ----------------------------------------------------------


@pytest.mark.parametrize("rows", range(1, 9))
def test_dot_products_are_the_instruction_and_its_sums_stay_in_registers(rows):
    code = machine_code("+avx512bf16", lambda b, args: emit_pass(dot_bf16.STEP, rows, 1, b, args), 11)
    assert code.count("vdpbf16ps") == rows * 3
    assert code.count("zmm") and "(%rsp), %zmm" not in code


@pytest.mark.parametrize("halves", [1, 2])
def test_tiles_are_the_instruction_four_at_a_time(halves):
    code = machine_code("+amx-tile,+amx-bf16", lambda b, args: amx.emit_group(halves, 1, b, args), 10)
    assert code.count("tdpbf16ps") == 2 * halves and code.count("tileloadd") == 3 * halves + 2

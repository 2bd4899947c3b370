"""Products of integers: exact sums, the same bits by any instruction. What a host lacks is compiled all the same, and
the instruction looked for in the machine code. The first test tells what ran."""

import gguf
import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu

from machine_code import machine_code
from paged_kernels.cpu import amx_int8, dot_int8, host, rotation
from paged_kernels.cpu.grids import in_one_layout, integers_of
from paged_kernels.cpu.integers import Integers, quantize
from paged_kernels.cpu.passes import emit_pass
from paged_kernels.cpu.quantized import QuantizedLinear, kernel_group

RUNNABLE = [product for product in host.INTEGERS if host.can_run(product)]
products = pytest.mark.parametrize("product", RUNNABLE, ids=lambda product: product.name)
KINDS = ("int8", "int4")
FORMS = {"a row": (8, None, False), "q8_0": (8, 32, False), "q4_0": (4, 32, False), "gptq": (4, 128, True)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(rows, depth, bits, group, minima, seed=0):
    """Weights as they come in some format."""
    random = torch.Generator().manual_seed(seed)
    group = group or depth
    shape = rows, -(-depth // group)
    codes = torch.randint(0, 2**bits, (rows, depth), dtype=torch.uint8, generator=random)
    scales = torch.rand(shape, generator=random).half() + 0.5
    return Integers(codes, scales, torch.randn(shape, generator=random).half() if minima else None, bits, group)


def rounded(x, weight):
    """The numbers that x becomes, in float64."""
    group, depth = kernel_group(weight), x.shape[-1]
    parts = torch.nn.functional.pad(x, (0, -depth % group)).unflatten(-1, (-1, group))
    largest = parts.abs().amax(-1, keepdim=True)
    codes = (parts * torch.where(largest > 0, 127 / largest, 0)).round()
    return (codes.double() * (largest / 127)).flatten(-2)[..., :depth]


def test_the_host_has_products_and_takes_the_first_that_is_worth_it(capsys):
    few, many, _ = host.choose_integers(8)
    with capsys.disabled():
        names = ", ".join(product.name for product in RUNNABLE)
        print(f"\nintegers on {llvm.get_host_cpu_name()}: can run {names}; takes {few.name}, then {many.name}")
    assert dot_int8.WIDENED in RUNNABLE and many is RUNNABLE[0]


@pytest.mark.parametrize(
    "features, lanes, few, many",
    [
        ({"amx-tile", "amx-int8", "avx512f", "avx512vnni"}, 16, "vnni", "amx_int8"),
        ({"avx512f", "avx512vnni"}, 16, "vnni", "vnni"),
        ({"avx512f"}, 16, "widened", "widened"),
        ({"avxvnni"}, 8, "vnni", "vnni"),
        (set(), 8, "widened", "widened"),
    ],
)
def test_what_is_chosen_follows_from_what_the_processor_has(features, lanes, few, many, monkeypatch):
    monkeypatch.setattr(host, "has", lambda *wanted: set(wanted) <= features)
    monkeypatch.setattr(host, "_tiles_are_permitted", lambda: True)
    monkeypatch.setattr(host, "LANES", lanes)
    assert [product.name for product in host.choose_integers(4)[:2]] == [few, many]


def test_a_product_that_the_host_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(host, "_tiles_are_permitted", lambda: False)
    with pytest.raises(ValueError, match="'amx_int8' can't compute products of integers on this host"):
        QuantizedLinear([quantize(draw(3, 4), "int8")], [None], product=amx_int8.AMX)


@products
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_the_integers_within_float32(form, product):
    for columns, depth in ((1, 1), (7, 3), (33, 64), (48, 200), (200, 515)):
        weight, bias = integers(columns, depth, *FORMS[form]), draw(columns, seed=1)
        packed, wide = QuantizedLinear([weight], [bias], product=product), weight.widened().double()
        for rows in (1, 2, 3, 7, 8, 9, 16, 17, 33, 65, 130):
            x = draw(rows, depth, seed=rows)
            seen = rounded(x, weight)
            truth, sizes = linear(seen, wide, bias.double()), linear(seen.abs(), wide.abs() + 8, bias.double().abs())
            ours = packed(x)
            assert ((ours - truth).abs() <= 2.0**-21 * sizes).all(), (columns, depth, rows)
            assert torch.equal(packed(x.bfloat16()), packed(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_on_any_number_of_threads_by_any_instruction(kind, gated):
    weights = [quantize(draw(100, 300, seed=i), kind) for i in range(2)]
    x, threads = draw(600, 300, seed=5), torch.get_num_threads()
    whole = QuantizedLinear(weights, [None, None], gated)(x)
    for product in (None, *RUNNABLE):
        packed = QuantizedLinear(weights, [None, None], gated, product)
        assert torch.equal(packed(x), whole)
        for rows in [*range(1, 40), 63, 64, 65, 97, 193, 257, 513]:
            assert torch.equal(packed(x[:rows]), whole[:rows]), rows
            assert torch.equal(packed(x[-rows:]), whole[-rows:]), rows
        try:
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                assert torch.equal(packed(x), whole)
        finally:
            torch.set_num_threads(threads)


@products
@pytest.mark.parametrize("kind", KINDS)
def test_several_layers_gated_pairs_and_residuals_come_out_as_one_by_one(kind, product):
    one, two, bias, x = draw(64, 200), draw(64, 200, seed=1), draw(64, seed=2), draw(3, 5, 200, seed=3) / 14
    one, two = quantize(one, kind), quantize(two, kind)
    a, b = (QuantizedLinear([w], [c], product=product)(x) for w, c in ((one, None), (two, bias)))
    assert torch.equal(QuantizedLinear([one, two], [None, bias], product=product)(x), torch.cat([a, b], -1))
    gate = QuantizedLinear([one, two], [None, bias], True, product)(x)
    torch.testing.assert_close(gate, silu(a) * b, atol=1e-6, rtol=1e-5)
    residual, packed = draw(3, 5, 64, seed=4), QuantizedLinear([one], [None], product=product)
    torch.testing.assert_close(packed(x, residual=residual), a + residual, atol=1e-6, rtol=1e-5)
    rough = residual.bfloat16()
    assert torch.equal(packed(x.bfloat16(), residual=rough), packed(x.bfloat16()) + rough)


@products
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_all_of_its_row_and_no_other(value, kind, product):
    packed, x = QuantizedLinear([quantize(draw(70, 64), kind)], [None], product=product), draw(20, 64)
    x[3, 5] = value
    out = packed(x)
    assert not out[3].isfinite().any() and out[[i for i in range(20) if i != 3]].isfinite().all()


@products
def test_no_number_is_read_beyond_the_rows_and_noughts_stay_noughts(product):
    packed = QuantizedLinear([quantize(draw(40, 70), "int4")], [None], product=product)
    wide = torch.full((7, 90), float("nan"))
    wide[1:-1, 10:80] = x = draw(5, 70)
    assert torch.equal(packed(wide[1:-1, 10:80]), packed(x))
    assert torch.equal(packed(torch.zeros(2, 70)), torch.zeros(2, 40))
    assert packed(torch.full((1, 70), 1e-38)).abs().max() < 1e-30
    assert packed(draw(0, 70)).shape == (0, 40)


def test_integers_err_by_half_a_step_at_most():
    weight = draw(20, 192)
    weight[3], weight[4, :32] = 0, 1e-30
    eight, four = quantize(weight, "int8"), quantize(weight.bfloat16(), "int4")
    errors = rotation.rotate(eight.widened() - weight) / rotation.factor(192)
    assert (errors.abs() <= 0.501 * eight.scales).all()
    assert torch.equal(eight.widened()[3], weight[3]) and torch.equal(four.widened()[3], weight[3])
    assert (four.widened() - weight).square().mean() < 0.012 * weight.square().mean()


@pytest.mark.parametrize("depth", [1, 70, 64 * 3, 576, 64 * 15, 64 * 43])
def test_rotated_rows_have_the_products_that_they_had_and_turn_back(depth):
    x, w = draw(3, depth), draw(5, depth, seed=1)
    a, b, factor = rotation.rotate(x), rotation.rotate(w), rotation.factor(depth)
    torch.testing.assert_close(linear(a, b) / factor, linear(x, w), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotation.rotate(a)[:, :depth] / factor, x, atol=1e-5, rtol=1e-5)


@products
def test_one_number_that_is_much_larger_costs_its_row_little(product):
    weight, x = draw(100, 576), draw(20, 576, seed=1)
    packed = QuantizedLinear([quantize(weight, "int8")], [None], product=product)
    large = x.clone()
    large[:, 3] = 300
    error, error_of_large = ((packed(rows) - linear(rows, weight)).norm() for rows in (x, large))
    assert error < 0.015 * linear(x, weight).norm()
    assert error_of_large < 0.015 * linear(large, weight).norm()


def test_weights_of_no_known_layout_are_refused():
    with pytest.raises(ValueError, match="groups of 48 weights aren't known; use multiples of 32"):
        QuantizedLinear([integers(3, 96, 4, 48, False)], [None])
    with pytest.raises(ValueError, match="several layouts"):
        QuantizedLinear([integers(3, 96, 4, 32, False), integers(3, 96, 4, 32, True)], [None, None])
    with pytest.raises(ValueError, match=r"rows of 131072 weights are too long"):
        QuantizedLinear([integers(1, 1 << 17, 8, None, False)], [None])
    with pytest.raises(ValueError, match="rows of 64 that were rotated have one scale, not one for 32"):
        Integers(torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 2), None, 8, 32, 64)
    with pytest.raises(ValueError, match=r"scales must be \[3, 2\]"):
        Integers(torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 1), None, 4, 32)


# ---- compiled for processors that have the instructions ----------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_dot_products_are_the_instruction_and_its_sums_stay_in_registers(rows, bits):
    step = dot_int8.make_step(bits, True, 16)
    code = machine_code("+avx512vnni", lambda b, args: emit_pass(step, rows, 1, b, args), 11)
    assert code.count("vpdpbusd") == rows * 2 * step.words
    assert code.count("zmm") and "(%rsp), %zmm" not in code


@pytest.mark.parametrize("bits", [8, 4])
def test_hosts_of_short_vectors_have_the_instruction_too_or_multiply_pairs_of_16_bits(bits):
    by_dot, widened = (dot_int8.make_step(bits, way, 8) for way in (True, False))
    code = machine_code("+avxvnni,-avx512f", lambda b, args: emit_pass(by_dot, 4, 1, b, args), 11, "x86-64-v3")
    assert code.count("vpdpbusd") == 4 * 2 * by_dot.words and "zmm" not in code
    code = machine_code("", lambda b, args: emit_pass(widened, 4, 1, b, args), 11, "x86-64-v3")
    assert code.count("vpmaddwd") == 2 * 4 * 2 * widened.words and "zmm" not in code


@pytest.mark.parametrize("halves", [1, 2])
def test_tiles_are_the_instruction_four_at_a_time(halves):
    code = machine_code("+amx-tile,+amx-int8", lambda b, args: amx_int8.emit_group(halves, True, b, args), 8)
    assert code.count("tdpbsud") == 2 * halves and code.count("tileloadd") == halves + 2
    assert code.count("tilestored") == code.count("tilezero") == 2 * halves


# ---- weights that were integers before -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, bits, minima", [("Q8_0", 8, False), ("Q4_0", 4, False), ("Q4_1", 4, True)])
def test_weights_that_gguf_made_of_integers_are_packed_as_these_to_the_last_bit(kind, bits, minima):
    form = gguf.GGMLQuantizationType[kind]
    weight = torch.from_numpy(gguf.dequantize(gguf.quantize(draw(20, 96).numpy(), form), form))
    weight[3, 32:64] = 0
    found = integers_of(weight, "int4")
    assert (found.bits, found.group, found.minima is not None) == (bits, 32, minima)
    assert torch.equal(found.widened(), weight)
    weight[7, 40] *= 1.01
    assert integers_of(weight, "int4").minima is not None and integers_of(weight, "int8").bits == 8


def q4_k(rows, depth, seed=0, levels=16):
    """Weights as gguf widens blocks of Q4_K: it makes none itself. ``levels`` of codes are used."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * depth // 256, 144), dtype=np.uint8)
    halves = random.uniform(1e-4, 3e-3, (len(blocks), 2)).astype(np.float16)
    blocks[:, :4] = halves.view(np.uint8)
    low, high = (random.integers(0, levels, (len(blocks), 128), dtype=np.uint8) for _ in range(2))
    blocks[:, 16:] = low | high << 4
    return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)).view(rows, depth)


@pytest.mark.parametrize("levels", [16, 9, 3])
def test_weights_of_ggufs_q4_k_are_packed_as_these_to_the_last_bit(levels):
    weight = q4_k(48, 512, levels=levels)
    weight[5] = 0.25
    found = integers_of(weight, "int4")
    assert (found.bits, found.group) == (4, 32) and torch.equal(found.widened(), weight)
    weight[7, 40] *= 1.01
    assert integers_of(weight, "int4").scales.dtype is torch.bfloat16, "rounded anew"


def test_weights_of_several_layouts_are_brought_into_one_or_refused():
    exact, anew, whole = (
        integers_of(q4_k(20, 256), "int4"),
        quantize(draw(30, 256), "int4"),
        integers(7, 256, 4, 256, False),
    )
    laid = in_one_layout([exact, anew, whole])
    assert len({each.layout for each in laid}) == 1
    for before, after in zip((exact, anew, whole), laid, strict=True):
        assert torch.allclose(
            after.widened(), before.widened(), rtol=1e-6, atol=1e-6 * float(before.widened().abs().max())
        )
    assert in_one_layout([exact, integers(7, 256, 8, 32, False)]) is None
    assert in_one_layout([quantize(draw(3, 256), "int8"), integers(7, 256, 8, 32, False)]) is None, "one is rotated"


def test_a_head_keeps_eight_bits():
    assert integers_of(draw(300, 32), "int4").bits == 8 and integers_of(draw(200, 32), "int4").bits == 4

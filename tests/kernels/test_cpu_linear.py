"""Packed products equal torch's, whatever the shape, and a row never depends on its neighbours."""

import pytest
import torch
from torch.nn.functional import linear, silu

from paged_kernels.cpu.linear import PackedLinear, can_pack

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}  # outputs are of size 1; bfloat16 rounds the result
DTYPES = list(TOLERANCE)


def draw(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x if len(shape) == 1 else x / shape[-1] ** 0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, depth", [(1, 1), (7, 3), (48, 192), (49, 193), (200, 500)])
def test_a_product_equals_torch_for_any_shape(columns, depth, dtype):
    weight, bias = draw(columns, depth, dtype=dtype), draw(columns, dtype=dtype, seed=1)
    packed = PackedLinear([weight], [bias])
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 64, 65, 130):
        x = draw(rows, depth, dtype=dtype, seed=rows) * depth**0.5
        truth = linear(x.double(), weight.double(), bias.double())
        assert packed(x).dtype is dtype
        torch.testing.assert_close(packed(x).double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_layers_and_gated_pairs_come_out_as_one_by_one(dtype):
    one, two = draw(70, 200, dtype=dtype), draw(70, 200, dtype=dtype, seed=1)
    bias, x = draw(70, dtype=dtype, seed=2), draw(3, 5, 200, dtype=dtype, seed=3) * 200**0.5
    a, b = linear(x.double(), one.double()), linear(x.double(), two.double(), bias.double())
    for packed, truth in (
        (PackedLinear([one, two], [None, bias]), torch.cat([a, b], -1)),
        (PackedLinear([one, two], [None, bias], gated=True), silu(a) * b),
    ):
        torch.testing.assert_close(packed(x).double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_on_any_number_of_threads(dtype, gated):
    weights = [draw(100, 300, dtype=dtype, seed=i) for i in range(2)]
    packed = PackedLinear(weights, [None, None], gated)
    x = draw(150, 300, dtype=dtype, seed=5) * 17
    whole, threads = packed(x), torch.get_num_threads()
    for start, stop in ((0, 1), (149, 150), (3, 7), (10, 18), (20, 37), (0, 64), (40, 105)):
        assert torch.equal(packed(x[start:stop]), whole[start:stop])
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(packed(x), whole)
    finally:
        torch.set_num_threads(threads)


def test_rows_may_lie_apart_and_may_be_none():
    weight = draw(60, 40)
    packed, x = PackedLinear([weight], [None]), draw(9, 100)
    torch.testing.assert_close(packed(x[:, 30:70]), linear(x[:, 30:70], weight))
    torch.testing.assert_close(packed(x[:, 0:80:2]), linear(x[:, 0:80:2], weight))
    assert packed(torch.empty(2, 0, 40)).shape == (2, 0, 60)


def test_an_input_that_is_not_finite_spoils_its_own_row_only():
    packed = PackedLinear([draw(96, 64), draw(96, 64, seed=1)], [None, None], gated=True)
    x = draw(20, 64) * 8
    clean = packed(x)
    x[3, 5], x[11, 0] = float("nan"), float("inf")
    spoilt = packed(x)
    assert spoilt[3].isnan().all() and not spoilt[11].isfinite().all()
    good = [i for i in range(20) if i not in (3, 11)]
    assert torch.equal(spoilt[good], clean[good])


def test_large_gates_do_not_overflow():
    packed = PackedLinear([torch.eye(4), torch.eye(4)], [None, None], gated=True)
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]])
    torch.testing.assert_close(packed(x), silu(x) * x, atol=1e-25, rtol=1e-6)


def test_the_cost_in_memory_is_the_weights_size_and_a_bias():
    packed = PackedLinear([draw(960, 576, dtype=torch.bfloat16)], [None])
    assert packed.num_bytes == 960 * 576 * 2 + 960 * 4


def test_only_dense_matrices_of_two_dtypes_are_taken():
    assert can_pack(draw(3, 4)) and can_pack(draw(3, 4, dtype=torch.bfloat16))
    assert not can_pack(draw(3, 4).half()) and not can_pack(draw(3)) and not can_pack(draw(3, 4).to_sparse())
    assert not can_pack(torch.empty(3, 4, device="meta")) and not can_pack(torch.empty(0, 4))

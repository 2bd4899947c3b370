"""The GPU's elementwise helpers and what the sampler asks for, against the reference.

Where there is no GPU, through Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from interpreter import DEVICE, ON_GPU, round_as_gpus_do
from paged_kernels import reference
from paged_kernels.triton import elementwise, sampling

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
widths = pytest.mark.parametrize("width", [1, 64, 100, 576, 5000])


@pytest.fixture(autouse=True)
def seed_device_and_rounding(monkeypatch):
    torch.manual_seed(0)
    round_as_gpus_do(monkeypatch)
    with DEVICE:  # whatever a test makes is made there
        yield


def assert_same(got, expected):
    """To the bit in 16-bit types, but for a rare sum in another order that rounds to the next number. On a GPU powers
    and roots are a float32's last digit off too, and a few more numbers near a tie round to their other side."""
    tolerance = 2e-6 if expected.dtype == torch.float32 else 2 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=2e-6)
    if expected.dtype != torch.float32:
        assert (got != expected).sum() <= (expected.numel() // 200 + 3 if ON_GPU else expected.numel() // 1000)


def draw(*shape, dtype):
    return (3 * torch.randn(shape)).to(dtype)


@dtypes
@widths
def test_norms_equal_the_reference(width, dtype):
    x, residual, weight = draw(2, 3, width, dtype=dtype), draw(2, 3, width, dtype=dtype), draw(width, dtype=dtype)
    assert_same(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for got, expected in zip(
        elementwise.add_rms_norm(x, residual, weight, 1e-5),
        reference.add_rms_norm(x, residual, weight, 1e-5),
        strict=True,
    ):
        assert_same(got, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's word for what GPUs do silently
@dtypes
@widths
def test_silu_and_product_equal_the_reference(width, dtype):
    gate, up = draw(2, 3, width, dtype=dtype), draw(2, 3, width, dtype=dtype)
    gate[0, 0, 0], gate[0, 1, 0] = 100.0, -100.0
    assert_same(elementwise.silu_mul(gate, up), reference.silu_mul(gate, up))


@dtypes
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "rotary_dim"),
    [(9, 3, 64, 64), (32, 8, 128, 128), (17, 17, 80, 80), (4, 1, 24, 8), (1, 1, 2, 2)],
)
def test_rotary_turns_views_in_place_and_into_new_tensors(num_heads, num_kv_heads, dim, rotary_dim, dtype):
    packed = draw(5, num_heads + num_kv_heads + 2, dim, dtype=dtype)
    expected = packed.clone()
    cos, sin = draw(5, rotary_dim, dtype=dtype), draw(5, rotary_dim, dtype=dtype)
    q, k = packed[:, :num_heads], packed[:, num_heads : num_heads + num_kv_heads]
    fresh = elementwise.rotated(q, k, cos, sin)
    assert torch.equal(packed, expected)
    elementwise.rotary(q, k, cos, sin)
    reference.rotary(expected[:, :num_heads], expected[:, num_heads : num_heads + num_kv_heads], cos, sin)
    assert_same(packed, expected)
    assert torch.equal(fresh[0], q) and torch.equal(fresh[1], k)
    assert all(x.is_contiguous() for x in fresh)


@dtypes
def test_rotary_takes_heads_that_lie_before_tokens(dtype):
    """As attention modules have them: [1,H,T,D] over memory in the order [T,H,D], and the other way round."""
    cos, sin = draw(6, 32, dtype=dtype), draw(6, 32, dtype=dtype)
    q, k = draw(4, 6, 32, dtype=dtype).transpose(0, 1), draw(2, 6, 32, dtype=dtype).transpose(0, 1)
    for got, expected in zip(elementwise.rotated(q, k, cos, sin), reference.rotated(q, k, cos, sin), strict=True):
        assert_same(got, expected)


@dtypes
def test_rows_that_are_columns_of_a_wider_tensor_are_taken_as_they_lie(dtype):
    wide, weight = draw(7, 300, dtype=dtype), draw(100, dtype=dtype)
    a, b = wide[:, 100:200], wide[:, 200:]
    assert_same(elementwise.rms_norm(a, weight, 1e-6), reference.rms_norm(a, weight, 1e-6))
    assert_same(elementwise.add_rms_norm(a, b, weight, 1e-6)[1], reference.add_rms_norm(a, b, weight, 1e-6)[1])
    assert_same(elementwise.silu_mul(a, b), reference.silu_mul(a, b))
    assert torch.equal(sampling.argmax_rows(a)[0], reference.argmax_rows(a)[0])


def test_what_the_kernels_cannot_take_is_computed_all_the_same():
    x, weight = torch.randn(3, 64, dtype=torch.float64), torch.randn(64)
    assert torch.equal(elementwise.rms_norm(x.half(), weight, 1e-5), reference.rms_norm(x.half(), weight, 1e-5))
    assert torch.equal(elementwise.silu_mul(x, x), reference.silu_mul(x, x))
    assert torch.equal(elementwise.silu_mul(x.half(), x[:1].half()), reference.silu_mul(x.half(), x[:1].half()))
    wide = torch.randn(2, elementwise._MAX_WIDTH + 1)
    assert torch.equal(elementwise.rms_norm(wide, wide[0], 1e-5), reference.rms_norm(wide, wide[0], 1e-5))
    q, k, cos = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.randn(4, 8, dtype=torch.float64)
    expected = [x.clone() for x in (q, k)]
    reference.rotary(*expected, cos, cos)
    elementwise.rotary(q, k, cos, cos)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
    assert torch.equal(sampling.argmax_rows(x)[0], x.argmax(-1))


def test_no_rows_are_no_trouble():
    empty = torch.empty(0, 64)
    assert elementwise.rms_norm(empty, torch.ones(64), 1e-5).shape == (0, 64)
    assert elementwise.add_rms_norm(empty, empty, torch.ones(64), 1e-5)[1].shape == (0, 64)
    assert elementwise.silu_mul(empty, empty).shape == (0, 64)
    assert elementwise.rotated(torch.empty(0, 2, 64), torch.empty(0, 1, 64), empty, empty)[0].shape == (0, 2, 64)
    assert sampling.argmax_rows(empty)[0].shape == (0,)
    assert sampling.top_rows(empty, 3)[1].shape == (0, 3)


@dtypes
def test_argmax_takes_the_first_of_equals_and_reports_nan(dtype):
    x = torch.randn(13, 9000).to(dtype)
    x[3, 100] = torch.nan
    x[4] = -torch.inf
    x[5, 7] = torch.inf
    x[6, 8999] = 100
    x[7, 5] = x[7, 8000] = 99
    x[8] = torch.nan
    x[9] = -torch.inf
    x[9, 8999] = -3
    x[10], x[10, 50], x[10, 5000] = -1, -0.0, 0.0
    x[11, 60], x[11, 61] = -torch.nan, torch.inf
    index, maximum = sampling.argmax_rows(x)
    expected_index, expected_maximum = reference.argmax_rows(x)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(maximum, expected_maximum, rtol=0, atol=0, equal_nan=True)
    assert index[7] == 5 and index[3] == 100 and index[10] == 50 and maximum[11].isnan()


@pytest.mark.parametrize("width", [1, 16, 4096, 4097])
def test_argmax_sees_every_place_of_a_row(width):
    places = torch.arange(0, width, max(1, width // 9))
    x = torch.full((len(places), width), -1.0).scatter_(1, places[:, None], 1.0)
    assert torch.equal(sampling.argmax_rows(x)[0], places)


@pytest.mark.parametrize(
    ("width", "k"), [(9000, 1), (9000, 5), (4000, 40), (640, 20), (100, 100), (64, 3), (65, 1), (1, 1)]
)
def test_the_largest_k_are_in_order_of_value_and_then_of_id(width, k):
    x = (4 * torch.randn(6, width)).round()
    x[0] = -torch.inf
    x[1], x[1, width // 2] = -torch.inf, 0.0
    x[2], x[2, ::2] = 0.0, -0.0
    x[3] = torch.arange(width)
    x[4, -1] = torch.inf
    values, ids = sampling.top_rows(x, k)
    expected_values, expected_ids = reference.top_rows(x, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


def test_the_largest_k_are_those_that_the_sampler_finds_without_these_kernels():
    from paged_core.sampling.draw import top_rows

    x = torch.randn(3, 9000)
    for got, expected in zip(sampling.top_rows(x, 20), top_rows(x, 20), strict=True):
        assert torch.equal(got, expected)

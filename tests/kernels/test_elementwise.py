"""The CPU's elementwise helpers against the reference, and the accuracy of what they are made of."""

from __future__ import annotations

import pytest
import torch

from paged_kernels import reference
from paged_kernels.cpu import elementwise
from paged_kernels.cpu.exponents import vexp2, vtanh
from paged_kernels.cpu.intrinsics import LANES
from paged_kernels.cpu.memory import load_i64, vload, vstore
from paged_kernels.cpu.parallel import kernel

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
widths = pytest.mark.parametrize("width", [4, 16, 17, 100, 576, 1536])


def assert_close(got, expected):
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if expected.dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-6}
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@both_dtypes
@widths
def test_norms_equal_the_reference(width, dtype):
    x = torch.randn(2, 19, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    assert_close(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@both_dtypes
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 80), (128, 64), (24, 8)])
def test_rotary_turns_views_in_place_exactly_as_torch_does(dim, rotary_dim, dtype):
    packed = torch.randn(33, 15, dim).to(dtype)
    expected = packed.clone()
    cos, sin = torch.randn(33, rotary_dim).to(dtype), torch.randn(33, rotary_dim).to(dtype)
    elementwise.rotary(packed[:, :9], packed[:, 9:12], cos, sin)
    reference.rotary(expected[:, :9], expected[:, 9:12], cos, sin)
    assert torch.equal(packed, expected)


@both_dtypes
def test_argmax_takes_the_first_of_equals_and_reports_nan(dtype):
    x = torch.randn(64, 49152).to(dtype)
    x[3, 100] = torch.nan
    x[4] = -torch.inf
    x[5, 7] = torch.inf
    x[6, 49151] = 100
    x[7, 5] = x[7, 49000] = 99
    x[8] = torch.nan
    x[9] = -torch.inf
    x[9, 49151] = -3
    index, maximum = elementwise.argmax_rows(x)
    expected_index, expected_maximum = reference.argmax_rows(x)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(maximum, expected_maximum, rtol=0, atol=0, equal_nan=True)
    assert index[7] == 5 and index[3] == 100 and maximum[3].isnan() and maximum[8].isnan()


@pytest.mark.parametrize("width", [1, 15, 16, 31, 1025, 5000])
def test_argmax_sees_every_place_of_a_row(width):
    x = torch.full((width, width), -1.0).fill_diagonal_(1.0)[:: max(1, width // 97)]
    assert torch.equal(elementwise.argmax_rows(x)[0], x.argmax(-1))


def test_rows_that_are_columns_of_a_wider_tensor_are_taken_as_they_lie():
    wide = torch.randn(20, 300)
    part, weight = wide[:, 100:200], torch.randn(100)
    assert_close(elementwise.rms_norm(part, weight, 1e-6), reference.rms_norm(part, weight, 1e-6))
    assert torch.equal(elementwise.argmax_rows(part)[0], part.argmax(-1))


def test_no_rows_are_no_trouble():
    assert elementwise.rms_norm(torch.empty(0, 64), torch.ones(64), 1e-5).shape == (0, 64)
    assert elementwise.argmax_rows(torch.empty(0, 64))[0].shape == (0,)


@kernel
def _exp2_and_tanh(args):
    for i in range(0, load_i64(args, 0), LANES):
        x = vload(load_i64(args, 1), i)
        vstore(load_i64(args, 2), i, vexp2(x))
        vstore(load_i64(args, 3), i, vtanh(x))


def _apply(x):
    powers, tanhs = torch.empty_like(x), torch.empty_like(x)
    args = torch.tensor([x.numel(), x.data_ptr(), powers.data_ptr(), tanhs.data_ptr()])
    _exp2_and_tanh(args.data_ptr(), 1)
    return powers.double(), tanhs.double()


def test_powers_of_two_and_tanh_are_accurate_to_the_last_places():
    x = torch.cat([torch.linspace(-126, 20, 1 << 18), torch.linspace(-2, 2, 1 << 18)])
    powers, tanhs = _apply(x)
    exact = torch.exp2(x.double())
    assert ((powers - exact).abs() / exact).max() < 1.2e-7
    exact = torch.tanh(x.double())
    assert ((tanhs - exact).abs() / exact.abs()).nan_to_num().max() < 2.5e-7


def test_powers_of_two_and_tanh_know_nothing_infinity_and_nan():
    x = torch.tensor([-torch.inf, -1e30, -127.0, torch.nan, 0.0, 1.0, 127.0, torch.inf] * (LANES // 8 or 1))
    powers, tanhs = _apply(x)
    assert powers[:3].tolist() == [0.0, 0.0, 0.0] and powers[3].isnan()
    assert powers[4:7].tolist() == [1.0, 2.0, 2.0**127]
    assert tanhs[:3].tolist() == [-1.0, -1.0, -1.0] and tanhs[3].isnan() and tanhs[7] == 1.0

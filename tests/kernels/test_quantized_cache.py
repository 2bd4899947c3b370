"""Caches of int8 and float8: a scale for each token and kv head."""

from __future__ import annotations

import pytest
import torch

from paged_kernels import reference
from paged_kernels.layers import Extras, LayerCache

DTYPES = [torch.int8, torch.float8_e4m3fn]
BLOCK_SIZE = 4


def make_caches(dtype, num_blocks=5, num_kv_heads=2, dims=(64, 32)):
    """Keys, values and their scales; the scales of slots that hold nothing are NaN."""
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE)
    caches = [torch.zeros(*shape, dim).to(dtype) for dim in dims]
    return *caches, torch.full(shape, torch.nan), torch.full(shape, torch.nan)


def stored(x, dtype):
    """``x [T,K,D]`` as it reads after it was stored."""
    codes, scale = reference.quantize(x, dtype)
    return codes.float() * scale[..., None]


def rounding(x, dtype):
    """The most that rounding may move each number of ``x [...,D]``."""
    scale = x.float().abs().amax(-1, keepdim=True) / reference.LARGEST[dtype]
    if dtype == torch.int8:
        return scale * 0.50001 + 0 * x
    return torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10) * 1.00001  # three bits, and the least number's half


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_read_is_what_was_stored_up_to_half_a_unit_of_the_code(dtype, source):
    x = (torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(0)) * 7).to(source)
    x32 = x.float()
    assert ((stored(x, dtype) - x32).abs() <= rounding(x32, dtype)).all()
    assert (stored(x, dtype) != x32).any(), "nothing was rounded: the test holds nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_magnitude_of_a_row_is_kept_and_reaches_the_largest_code(dtype):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    codes, _ = reference.quantize(x, dtype)
    assert (codes.float().abs().amax(-1) == reference.LARGEST[dtype]).all()
    torch.testing.assert_close(stored(x, dtype).abs().amax(-1), x.abs().amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_costs_its_own_token_and_head_only(dtype):
    x = torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(2))
    before = stored(x, dtype)
    x[2, 1, 5] = 3e4
    after = stored(x, dtype)
    others = torch.ones(6, 3, dtype=torch.bool)
    others[2, 1] = False
    assert torch.equal(after[others], before[others])
    assert ((after - x).abs() <= rounding(x, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e30], ids=str)
def test_zeros_and_very_small_and_large_rows_come_back_finite(dtype, size):
    x = torch.full((2, 64), size)
    codes, scale = reference.quantize(x, dtype)
    torch.testing.assert_close(codes.float() * scale[:, None], x, rtol=1e-6, atol=1e-38)
    assert (scale > 0).all()
    assert size != 0 or (scale == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_with_an_infinity_or_a_nan_reads_as_nan_and_no_other_does(dtype):
    x = torch.randn(4, 64)
    x[1, 3], x[2, 7] = torch.inf, torch.nan
    assert stored(x, dtype).isnan().all(-1).tolist() == [False, True, True, False]
    assert not stored(x, dtype)[[0, 3]].isnan().any()


def test_int8_codes_are_rounded_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0]])
    codes, scale = reference.quantize(x, torch.int8)
    assert (codes.tolist(), scale.tolist()) == ([[127, 0, 2, 2, 0, -2, 126, -127]], [1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_in_their_slots_and_nothing_else_has_changed(dtype):
    k, v = torch.randn(3, 2, 64), torch.randn(3, 2, 32)
    keys, values, key_scales, value_scales = make_caches(dtype)
    slots = torch.tensor([7, 16, 9])
    reference.store_kv(k, v, LayerCache(keys, values, key_scales, value_scales), slots)
    for x, cache, scales in ((k, keys, key_scales), (v, values, value_scales)):
        codes, scale = reference.quantize(x, dtype)
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, BLOCK_SIZE)
            assert torch.equal(cache[block, :, offset].float(), codes[token].float())
            assert torch.equal(scales[block, :, offset], scale[token])
        assert scales.isnan().sum() == scales.numel() - slots.numel() * 2
        assert (cache.float() != 0).any(-1).sum() == slots.numel() * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_attention_over_codes_equals_attention_over_what_they_stand_for(dtype, window):
    g = torch.Generator().manual_seed(3)
    k, v, q = (torch.randn(11, heads, dim, generator=g) for heads, dim in ((2, 64), (2, 32), (4, 64)))
    caches, floats = make_caches(dtype), make_caches(torch.float32)
    slots = torch.arange(BLOCK_SIZE, BLOCK_SIZE + 11)
    reference.store_kv(k, v, LayerCache(*caches), slots)
    reference.store_kv(stored(k, dtype), stored(v, dtype), LayerCache(*floats[:2]), slots)
    where = (torch.tensor([0, 11]), torch.tensor([11]), torch.tensor([[1, 2, 3]]), Extras(0.125, window))
    out = reference.paged_attention(q, LayerCache(*caches), *where)
    torch.testing.assert_close(out, reference.paged_attention(q, LayerCache(*floats[:2]), *where))


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_a_padding_row_is_zeros_and_changes_nobody_elses(dtype):
    keys, values, *scales = make_caches(dtype)
    if dtype == torch.float32:
        scales = [None, None]
    k, v, q = torch.randn(2, 2, 64), torch.randn(2, 2, 32), torch.randn(2, 4, 64)
    cache = LayerCache(keys, values, *scales)
    reference.store_kv(k, v, cache, torch.tensor([4, 0]))

    def attend(count):
        starts, lens = torch.arange(count + 1), torch.tensor([1, 0])[:count]
        where = (starts, lens, torch.tensor([[1], [0]])[:count], Extras(0.125))
        return reference.paged_attention(q[:count], cache, *where)

    assert torch.equal(attend(2)[0], attend(1)[0])
    assert (attend(2)[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_copied_as_blocks_are(dtype):
    caches = make_caches(dtype)
    k, v = torch.randn(4, 2, 64), torch.randn(4, 2, 32)
    reference.store_kv(k, v, LayerCache(*caches), torch.arange(4, 8))
    reference.copy_blocks(caches, [(1, 3)])
    for cache in caches:
        assert torch.equal(cache[3].float(), cache[1].float())

"""Launchers that write K/V, against the reference: tokens stored, quantised if asked; blocks copied and moved."""

from __future__ import annotations

import pytest
import torch

from attention_cases import CODED
from interpreter import DEVICE, round_as_gpus_do
from paged_kernels import reference
from paged_kernels.layers import LayerCache
from paged_kernels.triton import launch, writes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    round_as_gpus_do(monkeypatch)


@pytest.mark.parametrize("cache_dtype", [*DTYPES, *CODED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_tokens_are_in_their_slots_and_nothing_else_has_changed(dtype, cache_dtype):
    g = torch.Generator().manual_seed(1)
    packed = torch.randn(20, 5, 40, generator=g).mul(9).to(dtype).to(DEVICE)
    packed[3] = 0
    packed[5, :, ::2] *= 1e-3
    k, v = packed[:, :2], packed[:, 2:4, :20]  # views, as a packed projection gives them
    slots = torch.randperm(12 * 8, generator=g)[:20].to(DEVICE)
    shape = (12, 2, 8)
    expected = [torch.randn(*shape, d, generator=g).to(cache_dtype).to(DEVICE) for d in (40, 20)]
    if cache_dtype in CODED:
        expected += [torch.rand(shape, generator=g).to(DEVICE) for _ in range(2)]
    got = [x.clone() for x in expected]
    reference.store_kv(k, v, LayerCache(*expected), slots)
    launch.store_kv(k, v, LayerCache(*got), slots)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("cache_dtype", CODED, ids=str)
def test_a_row_that_holds_an_infinity_or_a_nan_reads_as_nan_and_no_other_does(cache_dtype):
    k = torch.randn(4, 2, 16, device=DEVICE)
    k[1, 0, 3], k[2, 1, 5] = torch.inf, torch.nan
    caches = [torch.zeros(1, 2, 4, 16, device=DEVICE).to(cache_dtype) for _ in range(2)]
    scales = [torch.zeros(1, 2, 4, device=DEVICE) for _ in range(2)]
    launch.store_kv(k, k, LayerCache(*caches, *scales), torch.arange(4, device=DEVICE))
    read = caches[0].float() * scales[0][..., None]
    spoilt = torch.zeros(1, 2, 4, dtype=torch.bool, device=DEVICE)
    spoilt[0, 0, 1] = spoilt[0, 1, 2] = True
    assert torch.equal(read.isnan().all(-1), spoilt) and torch.equal(read.isnan().any(-1), spoilt)


def test_every_e4m3_number_is_stored_as_itself_and_between_two_the_nearest():
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits.view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite() & (numbers >= 0)].sort().values  # [127], from 0 to 448
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between * 1.001, between * 0.999])
    x = torch.cat([x, x.new_zeros(-len(x) % 15)]).view(-1, 1, 15)
    k = torch.cat([torch.cat([x, -x]), torch.full((2 * len(x), 1, 1), 448.0)], -1)  # so that each row's scale is 1
    caches = [torch.zeros(8, 1, 16, 16, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = [torch.zeros(8, 1, 16, device=DEVICE) for _ in range(2)]
    launch.store_kv(k.to(DEVICE), k.to(DEVICE), LayerCache(*caches, *scales), torch.arange(len(k), device=DEVICE))
    got = caches[0].view(torch.uint8).view(-1, 16)[: len(k)].cpu()
    assert torch.equal(got, k.to(torch.float8_e4m3fn).view(torch.uint8).view(-1, 16))


def test_blocks_are_copied_in_order():
    shapes_and_dtypes = [((6, 2, 8, 16), torch.float32), ((6, 2, 8, 3), torch.int8), ((6, 2, 8), torch.float32)]
    caches = [(torch.randn(shape) * 9).to(dtype).to(DEVICE) for shape, dtype in shapes_and_dtypes]
    expected = [c.clone() for c in caches]
    pairs = [(1, 2), (2, 3), (5, 1), (0, 3), (4, 0)]
    reference.copy_blocks(expected, pairs)
    launch.copy_blocks(caches, pairs)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_pairs_of_one_launch_touch_no_block_that_another_of_them_writes(monkeypatch):
    """A launch copies in any order, which the interpreter, in its one order, does not show."""
    launches = []
    monkeypatch.setattr(writes, "move_blocks", lambda sources, targets, pairs: launches.append(pairs))
    launch.copy_blocks([], [(1, 2), (1, 3), (2, 4), (5, 1), (6, 1), (7, 8), (9, 7)])
    assert launches == [[(1, 2), (1, 3)], [(2, 4), (5, 1)], [(6, 1), (7, 8)], [(9, 7)]]


def test_blocks_are_moved_to_a_staging_tensor_and_back():
    caches = [torch.randn(6, 2, 8, d, device=DEVICE) for d in (16, 4)]
    staging = [torch.zeros(2, 2, 8, d, device=DEVICE) for d in (16, 4)]
    kept = [cache.clone() for cache in caches]
    launch.move_blocks(caches, staging, [(5, 0), (3, 1)])
    for cache in caches:
        cache.zero_()
    launch.move_blocks(staging, caches, [(0, 5), (1, 3)])
    for cache, before in zip(caches, kept, strict=True):
        assert torch.equal(cache[[5, 3]], before[[5, 3]])
        assert not cache[[0, 1, 2, 4]].any()

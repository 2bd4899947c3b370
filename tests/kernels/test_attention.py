"""The CPU's attention kernels against the reference: every launcher, over a grid of shapes."""

from __future__ import annotations

import threading

import pytest
import torch

from attention_cases import CODED, Case, make_case
from paged_kernels import reference
from paged_kernels.cpu import launch
from paged_kernels.layers import LayerCache

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MIX = ([1, 17, 70, 700, 33, 300, 64, 1500], [1, 17, 1, 1, 5, 200, 64, 1])  # sequence lengths, queries


def assert_equals_reference(case: Case) -> None:
    expected, got = case.run(reference.paged_attention), case.run(launch.paged_attention)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[case.q.dtype])


SHAPES = {
    "grouped": ((9, 3), (64, 64)),
    "one query head a kv head": ((4, 4), (32, 32)),
    "one kv head": ((32, 1), (128, 128)),
    "sixteen a group": ((32, 2), (80, 80)),
    "odd head dims": ((10, 2), (20, 100)),
    "narrow values": ((5, 1), (192, 128)),
    "smallest": ((2, 1), (16, 16)),
    "largest": ((8, 4), (256, 256)),
}
FACTS = {
    "plain": {},
    "short window": {"window": 7},
    "long window, softcap": {"window": 300, "softcap": 30.0},
    "sinks": {"sinks": True},
    "bias": {"bias": True},
    "all": {"window": 40, "softcap": 5.0, "sinks": True, "bias": True},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_rows_and_chunks_of_one_step_equal_the_reference(shape, facts, dtype):
    assert_equals_reference(make_case(*MIX, *shape, dtype=dtype, **facts))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cache_dtype", CODED, ids=str)
@pytest.mark.parametrize("facts", [FACTS["plain"], FACTS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_rows_and_chunks_over_caches_of_codes_equal_the_reference(shape, facts, cache_dtype, dtype):
    assert_equals_reference(make_case(*MIX, *shape, dtype=dtype, cache_dtype=cache_dtype, **facts))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 32, 128])
def test_any_block_size_equals_the_reference(block_size, cache_dtype):
    assert_equals_reference(make_case(*MIX, block_size=block_size, window=50, cache_dtype=cache_dtype))
    assert_equals_reference(make_case(*MIX, block_size=block_size, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_contexts_that_are_cut_into_stretches_equal_the_reference(cache_dtype):
    assert_equals_reference(make_case([5000, 4096, 4097], [1, 1, 1], cache_dtype=cache_dtype))
    assert_equals_reference(make_case([5000, 3000], [90, 7], sinks=True, cache_dtype=cache_dtype))
    assert_equals_reference(make_case([5000, 3000, 700], [90, 1, 1], bias=True, cache_dtype=cache_dtype))


def test_a_cache_may_be_narrower_than_the_queries():
    assert_equals_reference(make_case(*MIX, cache_dtype=torch.bfloat16))


@pytest.mark.parametrize("cache_dtype", CODED, ids=str)
def test_a_cache_of_codes_without_its_scales_is_refused(cache_dtype):
    case = make_case([20, 30], [1, 1], cache_dtype=cache_dtype)
    case.key_scales = case.value_scales = None
    with pytest.raises(ValueError, match="needs key_scales and value_scales"):
        case.run(launch.paged_attention)
    with pytest.raises(ValueError, match="needs key_scales and value_scales"):
        launch.store_kv(torch.randn(1, 2, 64), torch.randn(1, 2, 64), case.cache, torch.tensor([3]))


def test_every_float8_code_reads_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes.float().isfinite()
    values = torch.where(finite, codes.float(), 0.0).to(codes.dtype).view(1, 1, 1, 256)  # one block of one slot
    keys, scales = torch.zeros(1, 1, 1, 16).to(codes.dtype), torch.ones(1, 1, 1)
    starts, lens, table = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[0]]))
    case = Case(torch.randn(1, 1, 16), keys, values, starts, lens, table, 1.0, key_scales=scales, value_scales=scales)
    assert torch.equal(case.run(launch.paged_attention)[0, 0][finite], codes.float()[finite])


def test_queries_may_be_views_with_any_stride_between_heads_and_tokens():
    case = make_case(*MIX)
    expected = case.run(launch.paged_attention)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.run(launch.paged_attention), expected)


@pytest.mark.parametrize("spare", [0, 1, 16, 40])
def test_a_key_bias_may_know_more_positions_than_are_in_use(spare):
    case = make_case([20, 30, 33], [1, 30, 3], (4, 4))
    wide = torch.full((4, 33 + spare + 7), torch.nan)
    wide[:, :33] = torch.randn(4, 33)
    case.key_bias = wide[:, : 33 + spare]
    expected = case.run(reference.paged_attention)
    assert not expected.isnan().any()
    assert_equals_reference(case)


def test_a_key_bias_that_is_too_short_is_refused():
    case = make_case([20, 30], [1, 1], bias=True)
    case.key_bias = case.key_bias[:, :29]
    with pytest.raises(ValueError, match="29 positions, and a sequence has 30"):
        case.run(launch.paged_attention)


def test_a_request_without_queries_is_passed_over():
    case = make_case([20, 30, 40], [1, 0, 3])
    assert_equals_reference(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_decode_row_alone_equals_the_same_row_in_a_batch_bit_for_bit(dtype):
    lens = [1, 16, 170, 255, 257, 1000, 3000]
    case = make_case(
        lens, [1] * len(lens), dtype=dtype if dtype.is_floating_point else torch.float32, cache_dtype=dtype
    )
    together = case.run(launch.paged_attention)
    for r in range(len(lens)):
        assert torch.equal(case.row(r).run(launch.paged_attention), together[r : r + 1])


def test_results_do_not_depend_on_the_number_of_threads():
    case, threads = make_case(*MIX), torch.get_num_threads()
    together = case.run(launch.paged_attention)
    try:
        torch.set_num_threads(1)
        assert torch.equal(case.run(launch.paged_attention), together)
        torch.set_num_threads(3)
        assert torch.equal(case.run(launch.paged_attention), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("queries", [1, 6])
def test_a_nan_query_spoils_its_own_rows_only(queries):
    case = make_case([50, 60, 70], [queries] * 3)
    clean = case.run(launch.paged_attention)
    case.q = case.q.clone()
    case.q[queries, 2] = torch.nan  # the second request's first token, one head
    spoilt = case.run(launch.paged_attention)
    assert spoilt[queries, 2].isnan().all()
    spoilt[queries, 2] = clean[queries, 2]
    assert torch.equal(spoilt, clean)


def test_scores_far_apart_do_not_overflow():
    case = make_case([300, 40], [1, 40])
    case.q = case.q * 1e4
    expected = case.run(reference.paged_attention)
    torch.testing.assert_close(case.run(launch.paged_attention), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_offsets_into_a_cache_of_more_than_four_gigabytes_are_right(dtype):
    blocks = (1 << 32) // (16 * 16 * dtype.itemsize) + 10  # of 16 slots x 16 numbers; untouched memory costs nothing
    keys, values = torch.empty(blocks, 1, 16, 16, dtype=dtype), torch.empty(blocks, 1, 16, 16, dtype=dtype)
    scales = [torch.empty(blocks, 1, 16) if dtype in CODED else None for _ in range(2)]
    k, v = torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    slots = torch.arange(3) + (blocks - 1) * 16
    launch.store_kv(k, v, LayerCache(keys, values, *scales), slots)
    table = torch.tensor([[blocks - 1]], dtype=torch.int32)
    one, three = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    case = Case(torch.randn(1, 2, 16), keys, values, one, three, table, 0.25, None, None, None, None, *scales)
    assert_equals_reference(case)


@pytest.mark.parametrize("cache_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_stored_tokens_are_in_their_slots_and_nothing_else_has_changed(dtype, cache_dtype):
    g = torch.Generator().manual_seed(1)
    packed = torch.randn(50, 5, 40, generator=g).to(dtype)
    k, v = packed[:, :2], packed[:, 2:4, :20]  # views, as a packed projection gives them
    slots = torch.randperm(30 * 8, generator=g)[:50]
    caches = [torch.randn(30, 2, 8, d, generator=g).to(cache_dtype) for d in (40, 20)]
    expected = [c.clone() for c in caches]
    reference.store_kv(k, v, LayerCache(*expected), slots)
    launch.store_kv(k, v, LayerCache(*caches), slots)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@pytest.mark.parametrize("cache_dtype", CODED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_stored_codes_and_scales_are_those_of_the_reference_bit_for_bit(dtype, cache_dtype):
    g = torch.Generator().manual_seed(1)
    sizes = 10.0 ** torch.randint(-30, 30, (50, 5, 1), generator=g)
    packed = (torch.randn(50, 5, 40, generator=g) * sizes).to(dtype)
    packed[3], packed[4, 1], packed[5, 3] = 0, torch.nan, 1e-41
    packed[6, 0, 7], packed[7, 2, 33] = torch.inf, torch.nan
    packed[8] = torch.linspace(-0.02, 0.02, 40).to(dtype)  # codes of float8 with few bits, next to a large one
    packed[8, :, 0] = 1
    k, v = packed[:, :2], packed[:, 2:4, :20]  # views, as a packed projection gives them
    slots = torch.randperm(30 * 8, generator=g)[:50]
    caches = [torch.randint(0, 90, (30, 2, 8, d), generator=g).to(cache_dtype) for d in (40, 20)]
    caches += [torch.randn(30, 2, 8, generator=g) for _ in range(2)]
    expected = [c.clone() for c in caches]
    reference.store_kv(k, v, LayerCache(*expected), slots)
    launch.store_kv(k, v, LayerCache(*caches), slots)
    for got, wanted in zip(caches[:2], expected[:2], strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    for got, wanted in zip(caches[2:], expected[2:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache_dtype", [torch.float32, *CODED], ids=str)
def test_one_launch_stores_and_then_attends_to_what_it_stored(cache_dtype):
    case = make_case([70, 40, 33], [1, 40, 5], cache_dtype=cache_dtype)
    r = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 40, 5]))
    at = torch.cat([torch.arange(69, 70), torch.arange(40), torch.arange(28, 33)])
    slots = case.block_tables[r, at // 16].long() * 16 + at % 16
    k, v = torch.randn(46, 2, 64), torch.randn(46, 2, 64)
    plan = launch.AttentionPlan(4, 2, 64, 64)
    plan.plan(case.query_starts, case.seq_lens, case.block_tables, slots)
    got = plan.run(case.q, k, v, case.cache, case.extras)
    again = plan.run(case.q, k, v, case.cache, case.extras)
    reference.store_kv(k, v, case.cache, slots)
    torch.testing.assert_close(got, case.run(reference.paged_attention), rtol=0, atol=1e-5)
    assert torch.equal(got, again)


def test_blocks_are_copied_in_order():
    caches = [torch.randn(6, 2, 8, 16), torch.randn(6, 2, 8, 4)]
    expected = [c.clone() for c in caches]
    pairs = [(1, 2), (2, 3), (5, 1)]
    reference.copy_blocks(expected, pairs)
    launch.copy_blocks(caches, pairs)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))
    assert torch.equal(caches[0][3], expected[0][2])


def test_two_threads_may_launch_at_once():
    cases = [make_case(*MIX), make_case([100, 2000], [100, 1], (4, 4), (32, 32))]
    expected = [case.run(launch.paged_attention) for case in cases]
    wrong: list[int] = []

    def repeat(n: int) -> None:
        for _ in range(30):
            if not torch.equal(cases[n].run(launch.paged_attention), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=repeat, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

"""The GPU's attention kernels against the reference: every launcher, over a grid of shapes.

Through Triton's interpreter on small shapes; where there is a GPU, on it, and on real shapes too.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import attention_cases
from attention_cases import CODED, Case
from interpreter import DEVICE, ON_GPU, round_as_gpus_do
from paged_kernels import reference
from paged_kernels.layers import LayerCache
from paged_kernels.triton import elementwise, launch, prefill, sampling, tiles

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Sequence lengths and queries: a padded row, decode rows, chunks, a whole prompt, a row without queries.
MIX = ([0, 1, 90, 40, 70, 20], [1, 1, 1, 7, 70, 0])


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    round_as_gpus_do(monkeypatch)


def make_case(*args, **facts) -> Case:
    return attention_cases.make_case(*args, **facts).on(DEVICE)


def assert_equals_reference(case: Case) -> None:
    expected, got = case.run(reference.paged_attention), case.run(launch.paged_attention)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    tolerance = TOLERANCE[case.q.dtype]
    if ON_GPU and case.key_scales is not None:
        tolerance = max(tolerance, 3e-2)  # bfloat16 or tf32 stands for their digits
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


SHAPES = {
    "grouped": ((4, 2), (64, 64)),
    "one query head a kv head": ((2, 2), (128, 128)),
    "one kv head": ((8, 1), (96, 96)),
    "seven a group": ((7, 1), (80, 80)),
    "odd head dims": ((3, 1), (20, 100)),
    "narrow values": ((2, 1), (192, 128)),
    "wide heads": ((2, 1), (256, 256)),
    "a hundred and twelve": ((2, 1), (112, 112)),
}
FACTS = {
    "plain": {},
    "short window": {"window": 7},
    "window, softcap": {"window": 45, "softcap": 30.0},
    "sinks": {"sinks": True},
    "bias": {"bias": True},
    "all": {"window": 40, "softcap": 5.0, "sinks": True, "bias": True},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every shape plain, every fact on one shape, every pair of dtypes: their product would take the interpreter an hour.
GRID = [
    *(pytest.param(shape, {}, torch.float32, None, id=name) for name, shape in SHAPES.items()),
    *(pytest.param(SHAPES["grouped"], facts, torch.float32, None, id=name) for name, facts in FACTS.items() if facts),
    *(
        pytest.param(SHAPES["grouped"], FACTS["all"], dtype, cache, id=f"{dtype} queries, {cache} cache")
        for dtype in DTYPES
        for cache in (*DTYPES, *CODED)
    ),
]


@pytest.mark.parametrize(("shape", "facts", "dtype", "cache_dtype"), GRID)
def test_decode_rows_and_chunks_of_one_step_equal_the_reference(shape, facts, dtype, cache_dtype):
    assert launch.supports(dtype, cache_dtype or dtype)
    assert_equals_reference(make_case(*MIX, *shape, dtype=dtype, cache_dtype=cache_dtype, **facts))


@pytest.mark.parametrize("block_size", [8, 24, 64, 128])
def test_any_block_size_equals_the_reference(block_size):
    assert_equals_reference(make_case([150, 33], [1, 3], (2, 1), block_size=block_size, window=50))
    assert_equals_reference(make_case([150, 33], [1, 3], (2, 1), block_size=block_size))


def test_long_contexts_are_cut_into_splits_that_no_other_row_has_a_say_in():
    lens = [511, 512, 1300, 1]
    case = make_case(lens, [1] * 4, (2, 1), (16, 16), sinks=True)
    assert_equals_reference(case)
    together = case.run(launch.paged_attention)
    for r in range(4):
        assert torch.equal(case.row(r).run(launch.paged_attention), together[r : r + 1])


def test_a_very_long_context_has_longer_splits_not_more(monkeypatch):
    monkeypatch.setitem(tiles.SPLITS, "MAX_SPLITS", 4)
    assert_equals_reference(make_case([4 * tiles.SPLITS["SPLIT"] + 700, 30], [1, 1], (1, 1), (16, 16)))


def test_programs_take_several_items_each_where_there_are_many(monkeypatch):
    monkeypatch.setattr(tiles, "MAX_PROGRAMS", 2)
    assert_equals_reference(make_case([700, 30, 600, 5], [1] * 4, (2, 2), (16, 16)))


def test_a_step_of_more_requests_than_are_listed_at_once(monkeypatch):
    monkeypatch.setitem(tiles.LIST_TILE, "BLOCK", 4)
    assert_equals_reference(make_case([9, 3, 8] * 3, [1, 2, 1] * 3, (1, 1), (16, 16)))


def test_a_group_of_more_heads_than_a_tile_has_rows():
    assert_equals_reference(make_case([40, 20], [1, 4], (71, 1), (16, 16)))
    assert_equals_reference(make_case([40, 20], [1, 4], (150, 1), (16, 16)))


def test_queries_may_be_views_with_any_stride_between_heads_and_tokens():
    case = make_case([40, 30], [1, 9])
    expected = case.run(launch.paged_attention)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.run(launch.paged_attention), expected)


@pytest.mark.parametrize("queries", [1, 6])
def test_a_nan_query_spoils_its_own_rows_only(queries):
    case = make_case([50, 60], [queries] * 2)
    clean = case.run(launch.paged_attention)
    case.q = case.q.clone()
    case.q[queries, 2] = torch.nan  # the second request's first token, one head
    spoilt = case.run(launch.paged_attention)
    assert spoilt[queries, 2].isnan().all()
    spoilt[queries, 2] = clean[queries, 2]
    assert torch.equal(spoilt, clean)


def test_scores_far_apart_do_not_overflow():
    case = make_case([90, 40], [1, 40])
    case.q = case.q * 1e4
    torch.testing.assert_close(case.run(launch.paged_attention), case.run(reference.paged_attention), rtol=0, atol=1e-2)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # numpy's word for what GPUs do silently
@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("first", [0, 512])
def test_a_bias_may_hide_all_keys_of_a_split(first, hidden):
    case = make_case([600], [1], (2, 1), (16, 16), bias=True)
    case.key_bias[:, first : first + 512] = hidden
    assert_equals_reference(case)


def test_heads_that_no_tile_holds_are_refused():
    with pytest.raises(ValueError, match="576 and 512 are too large"):
        launch.AttentionPlan(16, 1, 576, 512)


def test_a_cache_with_gaps_between_its_blocks_is_refused():
    case = make_case([20, 30], [1, 3])
    case.keys = torch.stack([case.keys, case.values], 1)[:, 0]
    with pytest.raises(ValueError, match=r"one piece of memory.*4096, 1024, 64, 1"):
        case.run(launch.paged_attention)


@pytest.mark.parametrize("queries", [1, 3])
def test_sinks_reach_the_kernels_in_their_own_dtype_without_a_launch_to_convert_them(queries, monkeypatch):
    """Which is what warming up compiles for; any other dtype is right too."""
    case = make_case([20, 30], [queries] * 2, dtype=torch.bfloat16, sinks=True)
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "to", lambda *_, **__: pytest.fail("a conversion"))
        given = case.run(launch.paged_attention)
    case.sinks = case.sinks.float()
    assert torch.equal(case.run(launch.paged_attention), given)


@pytest.mark.parametrize("queries", [1, 3])
def test_offsets_into_a_cache_of_more_than_two_to_the_31_elements_are_right(queries):
    blocks = (1 << 31) // (16 * 16) + 10  # of 16 slots x 16 numbers; untouched memory costs nothing on a CPU
    keys, values = (torch.empty(blocks, 1, 16, 16, dtype=torch.float16, device=DEVICE) for _ in range(2))
    k, v = (torch.randn(3, 1, 16, device=DEVICE).half() for _ in range(2))
    slots = torch.arange(3, device=DEVICE) + (blocks - 1) * 16
    launch.store_kv(k, v, LayerCache(keys, values), slots)
    assert torch.equal(keys[-1, 0, :3], k[:, 0]) and torch.equal(values[-1, 0, :3], v[:, 0])
    launch.copy_blocks([keys, values], [(blocks - 1, blocks - 3)])
    assert torch.equal(keys[-3, 0, :3], k[:, 0]) and torch.equal(values[-3, 0, :3], v[:, 0])
    starts = torch.tensor([0, queries], dtype=torch.int32)
    q, table = torch.randn(queries, 2, 16).half(), torch.tensor([[blocks - 3]], dtype=torch.int32)
    case = Case(q, keys, values, starts, torch.tensor([3], dtype=torch.int32), table, 0.25)
    assert_equals_reference(case.on(DEVICE))


def test_a_planned_run_stores_and_then_attends_to_what_it_stored():
    case = make_case([70, 40, 33], [1, 40, 5])
    r = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 40, 5]))
    at = torch.cat([torch.arange(69, 70), torch.arange(40), torch.arange(28, 33)])
    slots = case.block_tables[r, at // 16].long() * 16 + at.to(DEVICE) % 16
    k, v = (torch.randn(46, 2, 64, device=DEVICE) for _ in range(2))
    plan = launch.AttentionPlan(4, 2, 64, 64, dtype=torch.float32)
    plan.plan(case.query_starts, case.seq_lens, case.block_tables, slots, 40, 70)
    got = plan.run(case.q, k, v, case.cache, case.extras)
    again = plan.run(case.q, k, v, case.cache, case.extras)
    reference.store_kv(k, v, case.cache, slots)
    torch.testing.assert_close(got, case.run(reference.paged_attention), rtol=0, atol=2e-5)
    assert torch.equal(got, again)


def test_what_is_compiled_for_any_kernel_counts(monkeypatch):
    """An operator is told of what is compiled late, be it attention's, a module's or the sampler's."""
    kernels = ((prefill, "prefill_kernel"), (elementwise, "_silu_mul"), (sampling, "_argmax_parts"))
    for module, name in kernels:
        monkeypatch.setattr(module, name, SimpleNamespace(device_caches={}))
    before = launch.num_compiles()
    for module, name in kernels:
        kernel = SimpleNamespace(device_caches={device: ({"one": 1, "two": 2}, None) for device in range(2)})
        monkeypatch.setattr(module, name, kernel)
    assert launch.num_compiles() == before + 12


if ON_GPU:
    LARGE = {
        "decode": ([4096, 3000, 17, 20000], [1] * 4),
        "prefill": ([2048, 1000], [2048, 1000]),
        "mixed": ([5000, 1700, 900, 70], [1, 512, 900, 3]),
    }

    @pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *CODED], ids=str)
    @pytest.mark.parametrize("facts", [{}, {"window": 1000, "softcap": 30.0, "sinks": True, "bias": True}], ids=str)
    @pytest.mark.parametrize("step", LARGE.values(), ids=LARGE)
    def test_real_shapes_equal_the_reference(step, facts, cache_dtype):
        assert_equals_reference(
            make_case(*step, (32, 8), (128, 128), dtype=torch.bfloat16, cache_dtype=cache_dtype, **facts)
        )

    def test_a_captured_step_is_replayed_with_other_lengths():
        case = make_case([300, 40, 900], [1, 1, 1], (8, 2), (128, 128), dtype=torch.bfloat16)
        plan = launch.AttentionPlan(8, 2, 128, 128)
        no_slots = torch.empty(0, dtype=torch.int64, device=DEVICE)

        def step() -> Tensor:
            plan.plan(case.query_starts, case.seq_lens, case.block_tables, no_slots, 1, 900)
            return plan.run(case.q, None, None, case.cache, case.extras)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for lens in ([300, 40, 900], [0, 13, 700]):
            case.seq_lens.copy_(torch.tensor(lens))
            graph.replay()
            torch.testing.assert_close(out, case.run(reference.paged_attention), rtol=0, atol=3e-2)

"""A row's result on the CPU, bit for bit: the same whoever shares its blocks, whether it comes alone or in a chunk, and
whatever the size of blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention_cases import Case, make_case, with_common_beginnings
from paged_kernels import reference
from paged_kernels.cpu import amx, dot_bf16, host, launch
from paged_kernels.layers import LayerCache

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "int8 under float32": {"cache_dtype": torch.int8},
    "int8 under bfloat16": {"dtype": torch.bfloat16, "cache_dtype": torch.int8},
    "float8 under bfloat16": {"dtype": torch.bfloat16, "cache_dtype": torch.float8_e4m3fn},
    "bfloat16 under float32": {"cache_dtype": torch.bfloat16},
}
FACTS = {
    "plain": {},
    "short window": {"window": 7},
    "long window, softcap": {"window": 200, "softcap": 30.0},
    "sinks": {"sinks": True},
    "bias": {"bias": True},
}
# Heads and head dims.
SHAPES = {
    "grouped": ((9, 3), (64, 64)),
    "one query head a kv head": ((4, 4), (32, 32)),
    "sixteen a group": ((32, 2), (80, 80)),
    "odd head dims": ((10, 2), (20, 100)),
}


def alone(case: Case) -> torch.Tensor:
    """Without looking for blocks in common."""
    plan = launch.AttentionPlan(
        case.q.shape[1], case.keys.shape[1], case.q.shape[2], case.values.shape[3], case.sliding_window
    )
    plan.plan(case.query_starts, case.seq_lens, case.block_tables, torch.empty(0, dtype=torch.int64))
    return plan.run(case.q, None, None, case.cache, case.extras)


def num_shared(case: Case) -> int:
    """Tokens whose requests share blocks."""
    plan = launch.AttentionPlan(
        case.q.shape[1], case.keys.shape[1], case.q.shape[2], case.values.shape[3], case.sliding_window,
        case.keys.shape[2],
    )  # fmt: skip
    plan.plan(case.query_starts, case.seq_lens, case.block_tables, torch.empty(0, dtype=torch.int64))
    return int(plan._given["num_shared_tokens"])


def assert_sharing_changes_nothing(case: Case) -> None:
    together = case.run(launch.paged_attention)
    assert torch.equal(together, alone(case))
    expected = case.run(reference.paged_attention)
    torch.testing.assert_close(together, expected, rtol=0, atol=TOLERANCE[case.q.dtype])
    for r in range(len(case.seq_lens)):
        start, stop = case.query_starts[r : r + 2].tolist()
        assert torch.equal(case.row(r).run(launch.paged_attention), together[start:stop])


LENS = [700, 700, 300, 400, 1200, 333, 640, 641, 90, 65, 64, 1]
QUERIES = [1, 1, 1, 3, 1, 1, 1, 1, 20, 1, 1, 1]
NESTED = [(0, [1, 2, 4, 6, 7], 256), (0, [1, 6, 7], 512), (0, [1], 688), (3, [5], 320), (8, [9], 64)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_that_share_blocks_equal_the_same_rows_alone(shape, facts, kind):
    case = with_common_beginnings(make_case(LENS, QUERIES, *shape, **facts, **kind), NESTED)
    assert num_shared(case) > 0 or "window" in facts
    assert_sharing_changes_nothing(case)


WAYS = ["float"] + [
    way for way, product in (("dot", dot_bf16.DOT), ("amx", amx.AMX)) if host.can_run(product)
]  # of computing attention of bfloat16


def test_the_host_computes_attention_as_it_does_products_of_bfloat16(capsys):
    with capsys.disabled():
        print(f"\nattention of bfloat16: can run {', '.join(WAYS)}; takes {host.choose_attention()}")
    assert host.choose_attention() in WAYS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "facts", [{}, {"window": 200, "softcap": 30.0, "sinks": True, "bias": True}], ids=["plain", "all"]
)
def test_each_way_to_compute_bfloat16_equals_the_reference_and_itself(facts, cache_dtype, way, monkeypatch):
    monkeypatch.setattr(host, "choose_attention", lambda: way)
    for shape in SHAPES.values():
        case = make_case(LENS, QUERIES, *shape, dtype=torch.bfloat16, cache_dtype=cache_dtype, **facts)
        assert_sharing_changes_nothing(with_common_beginnings(case, NESTED))
    case = make_case([700, 300, 130], [64, 7, 130], dtype=torch.bfloat16, cache_dtype=cache_dtype, **facts)
    assert_sharing_changes_nothing(case)


def test_requests_share_while_their_window_holds_all_they_have():
    case = with_common_beginnings(make_case([200, 200, 300, 300], [1] * 4), [(0, [1], 128), (2, [3], 128)])
    assert num_shared(case) == 4
    assert num_shared(replace(case, sliding_window=299)) == 2
    assert num_shared(replace(case, sliding_window=300)) == 4
    assert_sharing_changes_nothing(replace(case, sliding_window=299))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 32, 128])
def test_blocks_of_any_size_can_be_shared(block_size, dtype):
    case = with_common_beginnings(make_case(LENS, QUERIES, block_size=block_size, dtype=dtype), NESTED)
    assert_sharing_changes_nothing(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_many_requests_with_one_prompt_are_the_same_on_any_number_of_threads(threads, dtype):
    lens = [530 + 3 * r for r in range(40)]
    case = with_common_beginnings(make_case(lens, [1] * 40, (9, 3), dtype=dtype), [(0, list(range(1, 40)), 512)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_sharing_changes_nothing(case)
    finally:
        torch.set_num_threads(before)


def test_random_families_are_found_and_change_nothing():
    g = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    for _ in range(12):
        lens = [draw(1, 500) for _ in range(20)]
        families = []
        for _ in range(8):
            of = draw(0, 20)
            others = [r for r in range(20) if r != of and draw(0, 3) == 0]
            most = min(lens[r] for r in [of, *others])
            families.append((of, others, draw(0, most + 1)))
        case = with_common_beginnings(make_case(lens, [1] * 20, block_size=8), families)
        assert torch.equal(case.run(launch.paged_attention), alone(case))


def test_one_plan_serves_layer_after_layer_and_step_after_step():
    cases = [with_common_beginnings(make_case(LENS, QUERIES), NESTED), make_case([40, 700], [1, 1])]
    plan = launch.AttentionPlan(4, 2, 64, 64, None, 16)
    for case in [*cases, *cases]:
        expected = alone(case)
        plan.plan(case.query_starts, case.seq_lens, case.block_tables, torch.empty(0, dtype=torch.int64))
        for _ in range(3):
            assert torch.equal(plan.run(case.q, None, None, case.cache, case.extras), expected)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_query_of_a_chunk_equals_the_same_query_decoded(shape, facts, kind):
    """Whatever part of a prompt comes in one step."""
    whole = make_case([330], [60], *shape, **facts, **kind)
    expected = whole.run(launch.paged_attention)
    for queries, pieces in ((1, [0, 1, 17, 58, 59]), (2, [0, 31, 58]), (7, [10])):
        for at in pieces:
            part = replace(
                whole,
                q=whole.q[at : at + queries],
                query_starts=torch.tensor([0, queries], dtype=torch.int32),
                seq_lens=torch.tensor([270 + at + queries], dtype=torch.int32),
            )
            assert torch.equal(part.run(launch.paged_attention), expected[at : at + queries])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_results_do_not_depend_on_the_size_of_blocks(facts, kind):
    case = make_case([700, 333, 90], [1, 5, 40], (9, 3), block_size=8, **facts, **kind)
    expected = case.run(launch.paged_attention)
    for size in (16, 32, 24):
        other = in_blocks_of(size, case)
        assert torch.equal(other.run(launch.paged_attention), expected)


def in_blocks_of(size: int, case: Case) -> Case:
    """The same tokens in blocks of another size."""
    num_requests, old = len(case.seq_lens), case.keys.shape[2]
    num_blocks = -(-case.block_tables.shape[1] * old // size)
    tables = torch.arange(num_requests * num_blocks, dtype=torch.int32).view(num_requests, num_blocks) + 1
    position = torch.arange(case.block_tables.shape[1] * old)
    block, offset = case.block_tables[:, position // old].long(), position % old
    new_block, new_offset = tables[:, position // size].long(), position % size

    def moved(cache: torch.Tensor | None) -> torch.Tensor | None:
        if cache is None:
            return None
        bits = cache.view(torch.uint8) if cache.itemsize == 1 else cache
        new = bits.new_zeros(num_requests * num_blocks + 1, bits.shape[1], size, *bits.shape[3:])
        new[new_block, :, new_offset] = bits[block, :, offset]
        return new.view(cache.dtype)

    cache = LayerCache(*(moved(part) for part in case.cache))
    return replace(
        case, keys=cache.keys, values=cache.values, key_scales=cache.key_scales, value_scales=cache.value_scales,
        block_tables=tables,
    )  # fmt: skip

"""Requests whose block tables begin alike, on a GPU: their keys are read for several of them together, and that changes
no bit. Where there is no GPU, the kernels are interpreted, over short stretches of keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attention_cases import CODED, Case, make_case, with_common_beginnings
from interpreter import DEVICE, ON_GPU, round_as_gpus_do
from paged_kernels import reference
from paged_kernels.triton import launch, tiles, work

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
STRETCH = 64  # keys, in these tests


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    round_as_gpus_do(monkeypatch)
    monkeypatch.setitem(tiles.SPLITS, "SPLIT", STRETCH)


def planned(case: Case, block_size: int | None) -> launch.AttentionPlan:
    """``block_size`` None: nobody looks for blocks in common."""
    dims = (case.q.shape[1], case.keys.shape[1], case.q.shape[2], case.values.shape[3])
    plan = launch.AttentionPlan(*dims, case.sliding_window, case.q.dtype, case.keys.dtype, block_size)
    no_slots = torch.empty(0, dtype=torch.int64, device=DEVICE)
    longest = int(case.query_starts.diff().max())
    plan.plan(case.query_starts, case.seq_lens, case.block_tables, no_slots, longest, int(case.seq_lens.max()))
    return plan


def alone(case: Case) -> Tensor:
    return planned(case, None).run(case.q, None, None, case.cache, case.extras)


def together(case: Case) -> set[tuple[int, ...]]:
    """(a stretch, the requests that it is read for), where they are several."""
    rows, starts = (part.tolist() for part in planned(case, case.keys.shape[2]).decode_items)
    width = 1 + tiles.decode(*shape_of(case))["ROOM"]
    found = set()
    for item in range(starts[-1]):
        count, *requests = rows[item * width : (item + 1) * width]
        if count > 1:
            found.add((item - starts[requests[0]], *requests[:count]))
    return found


def shape_of(case: Case) -> tuple:
    group = case.q.shape[1] // case.keys.shape[1]
    return group, case.q.shape[2], case.values.shape[3], case.q.dtype, case.keys.dtype, tiles.card_of(DEVICE)


def assert_sharing_changes_nothing(case: Case) -> None:
    got = case.run(launch.paged_attention)
    assert torch.equal(got, alone(case))
    tolerance = TOLERANCE[case.q.dtype]
    if ON_GPU and case.key_scales is not None:
        tolerance = max(tolerance, 3e-2)  # bfloat16 or tf32 stands for their digits
    torch.testing.assert_close(got, case.run(reference.paged_attention), rtol=0, atol=tolerance)


# Decode rows, a padded one, and a chunk, which goes alone.
LENS = [80, 0, 150, 131, 129, 140, 63]
QUERIES = [1, 1, 1, 1, 1, 3, 1]
FAMILIES = [(2, [3, 4, 5], 128), (2, [0], 64), (0, [6], 48)]
ALL = {"window": 150, "softcap": 5.0, "sinks": True, "bias": True}
SHAPES = {
    "two kv heads": ((4, 2), (16, 16)),
    "one query head a kv head": ((1, 1), (32, 32)),
    "three a group, odd head dims": ((3, 1), (20, 40)),
    "more heads than a tile has room for twice": ((9, 1), (16, 16)),
}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GRID = [
    *(pytest.param(shape, {}, (F32, None), id=name) for name, shape in SHAPES.items()),
    *(
        pytest.param(((4, 1), (16, 16)), ALL, dtypes, id="{} queries, {} cache".format(*dtypes))
        for dtypes in ((F32, F32), (F16, F16), (BF16, BF16), *((BF16, coded) for coded in CODED))
    ),
]


@pytest.mark.parametrize(("shape", "facts", "dtypes"), GRID)
def test_rows_that_share_blocks_equal_the_same_rows_alone(shape, facts, dtypes):
    case = make_case(LENS, QUERIES, *shape, dtype=dtypes[0], cache_dtype=dtypes[1], **facts)
    case = with_common_beginnings(case, FAMILIES).on(DEVICE)
    assert bool(together(case)) == (shape[0] != (9, 1))
    assert_sharing_changes_nothing(case)


def test_a_row_that_shares_equals_the_row_by_itself():
    case = with_common_beginnings(make_case([150, 131], [1, 1], (4, 1), (16, 16)), [(0, [1], 128)]).on(DEVICE)
    assert together(case)
    assert torch.equal(case.row(1).run(launch.paged_attention), case.run(launch.paged_attention)[1:])


def test_whole_stretches_are_read_together_for_as_many_as_a_tile_has_room_for():
    """The chunk and the padded row are not among them."""
    case = with_common_beginnings(make_case(LENS, QUERIES, (4, 1), (16, 16)), FAMILIES).on(DEVICE)
    assert together(case) == {(0, 0, 2, 3, 4), (1, 2, 3, 4)}
    case = with_common_beginnings(make_case([70] * 6, [1] * 6, (4, 1), (16, 16)), [(0, list(range(1, 6)), 64)])
    assert together(case.on(DEVICE)) == {(0, 0, 1, 2, 3), (0, 4, 5)}


def test_requests_share_while_their_window_holds_all_they_have():
    case = make_case([70, 70, 130, 130], [1] * 4, (4, 1), (16, 16))
    case = with_common_beginnings(case, [(0, [1], 64), (2, [3], 128)]).on(DEVICE)
    assert together(replace(case, sliding_window=130)) == {(0, 0, 1), (0, 2, 3), (1, 2, 3)}
    assert together(replace(case, sliding_window=129)) == {(0, 0, 1)}
    assert_sharing_changes_nothing(replace(case, sliding_window=129))


@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_blocks_of_any_size_can_be_shared(block_size):
    case = make_case([150, 131], [1, 1], (4, 1), (16, 16), block_size=block_size)
    case = with_common_beginnings(case, [(0, [1], 128)]).on(DEVICE)
    assert together(case)
    assert_sharing_changes_nothing(case)


def test_a_stretch_of_which_one_block_differs_is_read_by_each():
    own = make_case([150, 131], [1, 1], (4, 1), (16, 16))
    case = with_common_beginnings(own, [(0, [1], 128)])
    for differs in (0, 1, 3):  # of the four blocks of the first stretch
        tables = case.block_tables.clone()
        tables[1, differs] = own.block_tables[1, differs]
        assert together(replace(case, block_tables=tables).on(DEVICE)) == {(1, 0, 1)}


def test_long_rows_share_where_they_are_cut_alike(monkeypatch):
    """Of at most four stretches each: those of 300 to 320 keys are cut at the same positions, that of 400 at others."""
    monkeypatch.setitem(tiles.SPLITS, "MAX_SPLITS", 4)
    case = make_case([320, 400, 300], [1] * 3, (4, 1), (16, 16))
    case = with_common_beginnings(case, [(0, [1, 2], 288)]).on(DEVICE)
    assert together(case) == {(0, 0, 2), (1, 0, 2), (2, 0, 2)}
    assert_sharing_changes_nothing(case)


def test_random_families_are_found_whole(monkeypatch):
    """Against a plain reading of the tables; looked for a few requests and blocks at a time."""
    monkeypatch.setattr(tiles, "SHARE_TILE", {**tiles.SHARE_TILE, "ROWS": 8, "COLUMNS": 8})
    g = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    num_found = 0
    for _ in range(2):
        lens = [draw(1, 140) for _ in range(9)]
        families = []
        for _ in range(4):
            of, others = draw(0, 9), [r for r in range(9) if draw(0, 3) == 0]
            families.append((of, others, draw(0, min(lens[r] for r in [of, *others]) + 1)))
        case = with_common_beginnings(make_case(lens, [1] * 9, (8, 1), (16, 16), block_size=8), families).on(DEVICE)
        assert together(case) == pairs_by_hand(case)
        num_found += len(together(case))
    assert num_found > 0


def pairs_by_hand(case: Case) -> set[tuple[int, ...]]:
    """With room for two requests in a tile."""
    size, found = case.keys.shape[2], set()
    for split in range(3):
        alike: dict[tuple[int, ...], list[int]] = {}
        for r, table in enumerate(case.block_tables.tolist()):
            if case.seq_lens[r] >= (split + 1) * STRETCH:
                blocks = table[split * STRETCH // size : (split + 1) * STRETCH // size]
                alike.setdefault(tuple(blocks), []).append(r)
        found |= {(split, *rows[i : i + 2]) for rows in alike.values() for i in range(0, len(rows) - 1, 2)}
    return found


def test_launches_that_are_replayed_share_what_the_new_tables_have_in_common(monkeypatch):
    """As a CUDA graph does: the launches of one step again, after all of its tensors were written over."""
    before = make_case([200, 190, 180], [1, 1, 1], (4, 1), (16, 16)).on(DEVICE)
    after = with_common_beginnings(before, [(0, [1, 2], 128)])
    expected, launches = alone(after), []
    for name in ("list_items_kernel", "share_kernel"):
        monkeypatch.setattr(work, name, Recorded(getattr(work, name), launches))
    static = replace(before, block_tables=before.block_tables.clone())
    plan = planned(static, 16)
    assert int(plan.decode_items[0][0]) == 1
    static.block_tables.copy_(after.block_tables)
    for again in tuple(launches):
        again()
    assert int(plan.decode_items[0][0]) == 3  # the first item is for all of them
    assert torch.equal(plan.run(static.q, None, None, static.cache, static.extras), expected)


class Recorded:
    """A kernel whose launches can be done again."""

    def __init__(self, kernel, launches) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid):
        def start(*args, **kwargs):
            self._launches.append(lambda: self._kernel[grid](*args, **kwargs))
            self._launches[-1]()

        return start

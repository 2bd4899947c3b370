"""Stores K/V and computes attention over paged K/V on the host's cores, in one kernel.

The kernel gets the address of a record (arguments.py). Its threads first divide the storing of this step's K and V
among them, then the items of attention (items.py). An item is a tile of query rows (query x head of one kv head's
group) and some tiles of keys, which begin at fixed positions. There are several ways to compute a tile, but on the same
numbers they all compute the same sums in the same order (sums.py). So a row's result depends, bit for bit, on nothing
but its query and its keys: not on the rest of the batch, on other requests with the same first blocks, on how many of
its tokens come at once, or on the block size.
"""

from __future__ import annotations

from numba import int64

from paged_kernels.cpu.amx import release
from paged_kernels.cpu.arguments import NEXT_ITEM, TICKET, as_arguments, as_item
from paged_kernels.cpu.few_rows import FEW, take_few, tile_of_few
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.items import ITEM_BYTES
from paged_kernels.cpu.many_rows import take_many, tile_of_many
from paged_kernels.cpu.memory import fetch_add
from paged_kernels.cpu.pair_tiles import set_up_tiles
from paged_kernels.cpu.pairs import take_pairs, tile_of_pairs
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.rows import CODES, find_rows, store_all
from paged_kernels.cpu.sharing import TILE
from paged_kernels.cpu.sums import (
    begin,
    clear,
    end,
    is_last_piece,
    keep_tile,
    note_sight,
    take_in_tiles,
)


def _make_store_and_attend(codes, pairs, amx):
    @kernel
    def store_and_attend(address):
        """Store this step's K and V, then compute every item."""
        store_all(address, codes)
        args = as_arguments(address)
        num_units = args.num_items * args.num_kv_heads
        if num_units == 0:
            return
        scratch = args.scratch + fetch_add(address + TICKET, 1) * args.scratch_stride
        if amx is not None:
            set_up_tiles(scratch)
        n, then = fetch_add(address + NEXT_ITEM, 1), int64(0)
        while n < num_units:
            then = fetch_add(address + NEXT_ITEM, 1)  # taken early, so that its first keys can be prefetched
            item, head = as_item(args.items + ITEM_BYTES * (n // args.num_kv_heads)), n % args.num_kv_heads
            next_item, next_head = item, head
            if then < num_units:
                next_item = as_item(args.items + ITEM_BYTES * (then // args.num_kv_heads))
                next_head = then % args.num_kv_heads
            _compute(args, item, head, scratch, next_item, next_head, codes, pairs, amx)
            n = then
        if amx is not None:
            release()

    return store_and_attend


def _make_store(codes):
    @kernel
    def store(address):
        """Store this step's K and V."""
        store_all(address, codes)

    return store


# There is one kernel for caches of floats, and one for caches of codes (see rows.CODES). Each is compiled when it is
# first used.
store, store_codes = _make_store(None), _make_store(CODES)
store_and_attend, store_and_attend_codes = (_make_store_and_attend(codes, None, None) for codes in (None, CODES))
# These are for bfloat16 queries, by vdpbf16ps and by AMX's tiles. numba removes the branches for None when it compiles.
store_and_attend_dot, store_and_attend_dot_codes = (_make_store_and_attend(codes, 1, None) for codes in (None, CODES))
store_and_attend_amx, store_and_attend_amx_codes = (_make_store_and_attend(codes, 1, 1) for codes in (None, CODES))


@inline
def _compute(args, item, head, scratch, next_item, next_head, codes, pairs, amx):
    """Compute an item's tiles: one after another into the rows' states. If other threads compute other pieces of the
    item, each tile's sums are kept separately instead."""
    state, out = scratch + args.at_rows, scratch + args.at_out
    if pairs is not None:
        take_pairs(args, item, head, scratch)
    elif item.num_rows <= FEW:
        take_few(args, item, head, scratch + args.at_q)
    else:
        take_many(args, item, head, scratch + args.at_q)
    note_sight(args, item, state)
    if item.num_pieces == 1:
        begin(args, item, head, state, out)
    for tile in range(item.tile_start, item.tile_stop, TILE):
        if item.num_pieces > 1:
            clear(args, item, state, out)
        ahead, ahead_head, ahead_start, ahead_stop = item, head, tile + TILE, item.key_stop
        if tile + TILE >= item.tile_stop:
            ahead, ahead_head = next_item, next_head
            ahead_start, ahead_stop = max(next_item.key_start, next_item.tile_start), next_item.key_stop
        lead, count = max(0, item.key_start - tile), min(TILE, item.key_stop - tile)
        if pairs is not None:
            tile_of_pairs(
                args, item, head, tile, lead, count, scratch, ahead, ahead_head, ahead_start, ahead_stop, codes, amx
            )
        else:
            _tile_of_floats(
                args, item, head, tile, lead, count, scratch, ahead, ahead_head, ahead_start, ahead_stop, codes
            )
        if item.num_pieces > 1:
            keep_tile(args, item, head, tile, state, out)
    if item.num_pieces > 1:
        if not is_last_piece(args, item, head):
            return
        begin(args, item, head, state, out)
        take_in_tiles(args, item, head, state, out)
    end(args, item, head, state, out)


@inline
def _tile_of_floats(args, item, head, tile, lead, count, scratch, ahead, ahead_head, ahead_start, ahead_stop, codes):
    state, out = scratch + args.at_rows, scratch + args.at_out
    queries, scores = scratch + args.at_q, scratch + args.at_scores
    key_rows = scratch + args.at_tables
    value_rows = key_rows + 8 * TILE
    find_rows(
        args, item, head, args.keys, args.key_scales, args.head_dim, tile, lead, count, key_rows,
        scratch + args.at_keys, codes,
    )  # fmt: skip
    find_rows(
        args, item, head, args.values, args.value_scales, args.value_dim, tile, lead, count, value_rows,
        scratch + args.at_values, codes,
    )  # fmt: skip
    if item.num_rows <= FEW:
        tile_of_few(
            args, item, head, tile, lead, count, key_rows, value_rows, queries, scores, state, out, ahead, ahead_head,
            ahead_start, ahead_stop, codes,
        )  # fmt: skip
    else:
        tile_of_many(args, item, head, tile, lead, count, key_rows, value_rows, queries, scores, state, out)

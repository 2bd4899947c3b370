"""Makes a step's list of work items: which query rows are computed with which keys. Each item is computed for all kv
heads in turn.

How the work is divided changes no result, so it is divided to keep the threads busy: if there would be too few items,
rows are divided further, and the keys of few rows are divided into pieces.
"""

from __future__ import annotations

from paged_kernels.cpu.arguments import ITEM, as_arguments, as_item, as_node
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.memory import load_i32, load_i64, store_i32, store_i64
from paged_kernels.cpu.parallel import kernel
from paged_kernels.cpu.sharing import NODE_BYTES, TILE, find_groups

ITEM_BYTES = ITEM.itemsize
LEAST_PIECE = 4  # tiles of keys in a piece, at least
ITEMS_A_THREAD = 8  # items for each thread that dividing into pieces aims at


@kernel
def plan_groups(address):
    """Find requests that begin with the same blocks, list the tokens, and count the items and everything else."""
    args = as_arguments(address)
    find_groups(args)
    _list_tokens(args)
    args.num_shared_rows = args.num_shared_tokens * args.group
    args.items = 0
    _go_through(args)


@kernel
def plan_items(address):
    """Write the items that ``plan_groups`` has counted."""
    _go_through(as_arguments(address))


@inline
def _list_tokens(args):
    """Write the list of tokens: all in order, then those of requests that share blocks, in the order of the groups.
    ``stack`` becomes the index of each request's first token in the list."""
    num_tokens = load_i32(args.query_starts, args.num_requests)
    for token in range(num_tokens):
        store_i32(args.tokens, token, token)
    for r in range(args.num_requests):
        store_i64(args.stack, r, load_i32(args.query_starts, r))
    place, i = num_tokens, 0
    while place < num_tokens + args.num_shared_tokens:
        r = load_i64(args.order, i)
        if load_i64(args.reach, r) > 0:
            store_i64(args.stack, r, place)
            for token in range(load_i32(args.query_starts, r), load_i32(args.query_starts, r + 1)):
                store_i32(args.tokens, place, token)
                place += 1
        i += 1


@inline
def _go_through(args):
    """Write the items of this step to ``items``, or, while that is 0, only count items, partials and counters."""
    args.num_items = args.num_partials = args.num_counters = 0
    num_rows, num_tiles = _measure(args)
    row_tile = args.row_tile
    while row_tile > 16 and num_rows * args.num_kv_heads < 2 * args.num_threads * row_tile:
        row_tile //= 2
    piece = max(LEAST_PIECE, num_tiles * args.num_kv_heads // (ITEMS_A_THREAD * args.num_threads) + 1)
    if args.num_threads == 1:
        piece = num_tiles + 1
    for n in range(args.num_nodes):
        _plan_node(args, as_node(args.nodes + NODE_BYTES * n), row_tile)
    for wanted in range(2):  # requests with many rows come first, because their items are the largest
        for r in range(args.num_requests):
            num_queries = load_i32(args.query_starts, r + 1) - load_i32(args.query_starts, r)
            if num_queries > 0 and (num_queries * args.group > args.few_rows) == (wanted == 0):
                _plan_request(args, r, num_queries, row_tile, piece)


@inline
def _measure(args):
    """Count the rows of all requests, and the tiles of keys of requests with few rows."""
    num_rows = num_tiles = 0
    for r in range(args.num_requests):
        rows = (load_i32(args.query_starts, r + 1) - load_i32(args.query_starts, r)) * args.group
        num_rows += max(rows, args.row_tile) if rows > 0 else 0
        num_keys = min(load_i32(args.seq_lens, r), args.window)
        num_tiles += num_keys // TILE + 1 if rows <= args.few_rows else 0
    return num_rows, num_tiles


@inline
def _plan_node(args, node, row_tile):
    first = load_i64(args.order, node.first)
    last = load_i64(args.order, node.stop - 1)
    place = load_i64(args.stack, first)
    after = load_i64(args.stack, last) + load_i32(args.query_starts, last + 1) - load_i32(args.query_starts, last)
    num_rows = (after - place) * args.group
    for row in range(0, num_rows, row_tile):
        _add(args, first, place, row, min(row_tile, num_rows - row), 0, 1, node.key_start, node.key_stop, 0, 1, 0)


@inline
def _plan_request(args, r, num_queries, row_tile, piece):
    place, first_query = load_i64(args.stack, r), load_i32(args.seq_lens, r) - num_queries
    num_rows, shared = num_queries * args.group, load_i64(args.reach, r)
    row = (num_rows - 1) // row_tile * row_tile
    while row >= 0:  # from the last tile of rows on, which sees the most keys
        count = min(row_tile, num_rows - row)
        key_stop = first_query + (row + count - 1) // args.group + 1
        key_start = max(shared, first_query + row // args.group - args.window + 1)
        first, stop = key_start // TILE, (key_stop - 1) // TILE + 1
        num_pieces = (stop - first + piece - 1) // piece if num_rows <= args.few_rows else 1
        for n in range(num_pieces):
            _add(args, r, place, row, count, first_query, 0, key_start, key_stop, n, num_pieces, 1)
        if num_pieces > 1:
            args.num_partials += args.num_kv_heads * (stop - first) * count
            args.num_counters += args.num_kv_heads
        row -= row_tile


@inline
def _add(args, r, place, row, count, position, many, key_start, key_stop, n, num_pieces, ends):
    if args.items != 0:
        item = as_item(args.items + ITEM_BYTES * args.num_items)
        item.request, item.first_token, item.first_row, item.num_rows = r, place, row, count
        item.first_position, item.many_requests = position, many
        item.key_start, item.key_stop = key_start, key_stop
        first, stop = key_start // TILE, (key_stop - 1) // TILE + 1
        item.tile_start = (first + (stop - first) * n // num_pieces) * TILE
        item.tile_stop = (first + (stop - first) * (n + 1) // num_pieces) * TILE
        item.num_pieces, item.partial, item.counter = num_pieces, args.num_partials, args.num_counters
        num_tokens = load_i32(args.query_starts, args.num_requests)
        item.state = (place - num_tokens) * args.group + row
        item.goes_on = 1 if place >= num_tokens and key_start > 0 else 0
        item.ends = ends
    args.num_items += 1

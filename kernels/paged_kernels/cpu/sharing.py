"""Finds the requests of a step that begin with the same blocks, from their block tables alone.

Requests that have whole tiles of keys in common, from the first tile on, become a node. Those among them that have more
in common become a node below it, and so on. In the resulting order, the requests of each node are neighbours.
"""

from __future__ import annotations

from paged_kernels.cpu.arguments import NODE, as_node
from paged_kernels.cpu.intrinsics import inline
from paged_kernels.cpu.memory import load_i32, load_i64, store_i64

TILE = 64  # keys; a row's sums are computed tile by tile, at fixed positions
MOST_ROWS = 32  # of a request that shares; with more rows, a tile of keys is used often enough by its own rows
NODE_BYTES = NODE.itemsize


@inline
def find_groups(args):
    """Write ``order i64 [R]``, which begins with the requests that could share; ``reach i64 [R]``, the keys up to which
    a request shares; and the nodes, at most two per request, upper ones before lower ones."""
    num_nodes, num_requests = 0, args.num_requests
    count = _could_share(args)
    depth = _push(args.stack, 0, 0, count, 0)
    while depth > 0:
        depth -= 1
        at = args.stack + NODE_BYTES * depth
        first, stop, start = load_i64(at, 0), load_i64(at, 1), load_i64(at, 2)
        while first < stop:
            end = _gather_equals(args, first, stop, start)
            if end - first > 1:
                reach = _reach_together(args, first, end, start)
                node = as_node(args.nodes + NODE_BYTES * num_nodes)
                node.first, node.stop, node.key_start, node.key_stop = first, end, start, reach
                num_nodes += 1
                for i in range(first, end):
                    store_i64(args.reach, load_i64(args.order, i), reach)
                depth = _push(args.stack, depth, first, end, reach)
            first = end
    args.num_nodes = num_nodes
    args.num_shared_tokens = 0
    for r in range(num_requests):
        if load_i64(args.reach, r) > 0:
            args.num_shared_tokens += load_i32(args.query_starts, r + 1) - load_i32(args.query_starts, r)


@inline
def _could_share(args):
    """Put the requests that have few rows and see all keys into the order. None of them shares yet."""
    count = 0
    for r in range(args.num_requests):
        store_i64(args.reach, r, 0)
        if args.planned_block_size > 0 and _limit(args, r) > 0:
            store_i64(args.order, count, r)
            count += 1
    return count


@inline
def _limit(args, r):
    """Return how many keys a request could share: whole tiles before its first query."""
    num_queries = load_i32(args.query_starts, r + 1) - load_i32(args.query_starts, r)
    num_keys = load_i32(args.seq_lens, r)
    if num_queries == 0 or num_queries * args.group > MOST_ROWS or num_keys > args.window:
        return 0
    return (num_keys - num_queries) // TILE * TILE


@inline
def _push(stack, depth, first, stop, start):
    at = stack + NODE_BYTES * depth
    store_i64(at, 0, first)
    store_i64(at, 1, stop)
    store_i64(at, 2, start)
    return depth + 1


@inline
def _gather_equals(args, first, stop, start):
    """Move the requests of order[first:stop] that have the first one's blocks for the tile at ``start`` next to it.
    Returns where they end."""
    leader = load_i64(args.order, first)
    end = first + 1
    if _limit(args, leader) <= start:
        return end
    for i in range(first + 1, stop):
        other = load_i64(args.order, i)
        if _limit(args, other) > start and _agree(args, leader, other, start):
            store_i64(args.order, i, load_i64(args.order, end))
            store_i64(args.order, end, other)
            end += 1
    return end


@inline
def _reach_together(args, first, stop, start):
    """Return up to which key all of order[first:stop] have the same blocks."""
    leader = load_i64(args.order, first)
    reach = _limit(args, leader)
    for i in range(first + 1, stop):
        other = load_i64(args.order, i)
        most, key = min(reach, _limit(args, other)), start + TILE
        while key < most and _agree(args, leader, other, key):
            key += TILE
        reach = min(reach, key)
    return reach


@inline
def _agree(args, one, other, start):
    """Return whether two requests have the same blocks for the tile of keys at ``start``."""
    a, b = args.tables + 4 * one * args.table_stride, args.tables + 4 * other * args.table_stride
    for block in range(start // args.planned_block_size, (start + TILE - 1) // args.planned_block_size + 1):
        if load_i32(a, block) != load_i32(b, block):
            return False
    return True

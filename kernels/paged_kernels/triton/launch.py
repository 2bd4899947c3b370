"""Launchers of the GPU's attention kernels: torch tensors in, torch tensors out.

``AttentionPlan`` is made once for layers of one shape, given each step's metadata once, and run once a layer. The
functions below have the signatures of ``paged_kernels.reference``. No launcher waits for the device, and what it
allocates depends on shapes alone, so all of them can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from paged_kernels.layers import Extras, LayerCache
from paged_kernels.triton import decode, elementwise, prefill, sampling, store, tiles, work

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CODES = (torch.int8, torch.float8_e4m3fn)  # of quantised caches
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def num_compiles() -> int:
    """Kernels compiled so far, modules' and the sampler's too, for all devices of this process; interpreted ones count
    for nothing."""
    modules = (work, decode, prefill, store, elementwise, sampling)
    kernels = {id(thing): thing for module in modules for thing in vars(module).values()}.values()
    caches = (found for kernel in kernels for found in getattr(kernel, "device_caches", {}).values())
    return sum(len(cache[0]) for cache in caches)


def supports(dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Whether queries of ``dtype`` and caches of ``cache_dtype`` can be run."""
    return dtype in _FLOATS and cache_dtype in (*_FLOATS, *_CODES)


def fits(head_dim: int, value_head_dim: int) -> bool:
    """Whether a head of this size fits into a GPU's registers and shared memory."""
    return max(head_dim, value_head_dim) <= 256


class AttentionPlan:
    """Attention for layers of one shape, whose queries and caches have one dtype each (``cache_dtype`` None: the
    queries'). One step at a time. ``block_size``: of the caches to come; where it is given, blocks that several
    requests of a step begin with are read for many of them together. That changes no result."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        sliding_window: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        cache_dtype: torch.dtype | None = None,
        block_size: int | None = None,
    ) -> None:
        if not fits(head_dim, value_head_dim):
            raise ValueError(f"head dims of {head_dim} and {value_head_dim} are too large for a GPU's tiles: up to 256")
        self._group = num_heads // num_kv_heads
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        self._dims = (head_dim, value_head_dim)
        self._window, self._block_size = sliding_window, block_size
        self._shape = (self._group, *self._dims, dtype, cache_dtype or dtype)

    def plan(
        self,
        query_starts: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
        max_query_len: int,
        max_seq_len: int,
    ) -> None:
        """Take in a step: ``i32 [R+1], i32 [R], i32 [R,B], i64 [T]`` on the layers' device; of the two lengths no
        request has more. The work is listed there too: tensors may be rewritten and the launches replayed."""
        assert query_starts.dtype == seq_lens.dtype == block_tables.dtype == torch.int32
        assert slot_mapping.dtype == torch.int64
        num_requests = seq_lens.shape[0]
        card = tiles.card_of(seq_lens.device)
        self._decode_tile = tiles.decode(*self._shape, card)
        self._prefill_tile = tiles.prefill(*self._shape, card)
        self._combine_tile = tiles.combine(*self._dims)
        self._query_starts, self._seq_lens, self._slots = query_starts.contiguous(), seq_lens.contiguous(), slot_mapping
        self._tables = block_tables if block_tables.stride(-1) == 1 else block_tables.contiguous()
        self._prefills = max_query_len > 1
        num_keys = min(max_seq_len, self._window or max_seq_len)
        splits = min(-(-num_keys // tiles.SPLITS["SPLIT"]), tiles.SPLITS["MAX_SPLITS"])
        self._max_splits = num_requests * splits
        room = self._decode_tile["ROOM"]
        self._decode_items = _items(self._max_splits, num_requests, seq_lens.device, 1 + room)
        self._max_tiles = 0
        self._prefill_items: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._prefills:
            tiles_of_longest = -(-max_query_len * self._group // self._prefill_tile["BLOCK_M"])
            num_tokens = slot_mapping.shape[0] or num_requests * max_query_len
            of_all = num_tokens * self._group // self._prefill_tile["BLOCK_M"] + num_requests
            self._max_tiles = min(num_requests * tiles_of_longest, of_all)
            self._prefill_items = _items(self._max_tiles, num_requests, seq_lens.device)
        with _on(seq_lens.device):
            work.list_items_kernel[1,](
                self._query_starts, self._seq_lens, *self._decode_items, *self._prefill_items, num_requests,
                self._window, GROUP=self._group, BLOCK_M=self._prefill_tile["BLOCK_M"], ROOM=room, **tiles.SPLITS,
                **tiles.LIST_TILE,
            )  # fmt: skip
            if self._can_share(num_requests, num_keys, room):
                work.share_kernel[self._max_splits,](
                    self._query_starts, self._seq_lens, self._tables, *self._decode_items, num_requests,
                    self._tables.stride(0), self._window, BLOCK_SIZE=self._block_size, ROOM=room, **tiles.SPLITS,
                    **tiles.SHARE_TILE,
                )  # fmt: skip

    def _can_share(self, num_requests: int, num_keys: int, room: int) -> bool:
        """What can be told without a look at block tables: two requests, and a whole stretch that both have had.

        The look costs a launch a step, a few microseconds. One stretch that two requests read together saves 256 KiB a
        kv head and layer (head dim 128, 16 bits): at the 4 TB/s that decode reads on an H200, 15 microseconds for 8 kv
        heads and 30 layers. So it pays from the first on. Neither time has been measured."""
        return self._block_size is not None and room > 1 and num_requests > 1 and num_keys > tiles.SPLITS["SPLIT"]

    def run(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: LayerCache, extras: Extras) -> Tensor:
        """Store ``k [T,K,D], v [T,K,Dv]`` (if given) at the planned slots, then attend: ``q [T,H,D] -> [T,H,Dv]``. The
        window is the plan's own."""
        if k is not None and v is not None:
            store_kv(k, v, cache, self._slots)
        for part in cache:
            if part is not None and not part.is_contiguous():
                raise ValueError(
                    f"a cache is read as one piece of memory, and one has strides {part.stride()}: make it contiguous"
                )
        key_cache, value_cache = _bits(cache.keys), _bits(cache.values)
        scale, _, softcap, sinks, key_bias = extras
        if key_bias is not None:
            key_bias = key_bias.detach().to(torch.float32)
            key_bias = key_bias if key_bias.stride(1) == 1 else key_bias.contiguous()
        if sinks is not None:
            sinks = sinks.detach().contiguous()
        q, *q_strides = _rows(q)
        out = torch.empty((q.shape[0], self._num_heads, self._dims[1]), dtype=q.dtype, device=q.device)
        cache_arguments = (key_cache, value_cache, cache.key_scales, cache.value_scales, key_bias)
        step = (self._query_starts, self._seq_lens, self._tables, self._seq_lens.shape[0], self._num_heads, *q_strides)
        strides = (self._tables.stride(0), None if key_bias is None else key_bias.stride(0))
        facts = (self._window, float(scale), None if softcap is None else float(softcap))
        block_size = key_cache.shape[2]
        with _on(q.device):
            if self._max_tiles:
                prefill.prefill_kernel[self._max_tiles, self._num_kv_heads](
                    q, *cache_arguments, sinks, out, *self._prefill_items, *step, *strides, *facts,
                    BLOCK_SIZE=block_size, **self._prefill_tile,
                )  # fmt: skip
            if self._max_splits and not self._only_prefills(q.shape[0]):
                self._decode(q, cache_arguments, (*step, *strides, *facts), sinks, out, block_size)
        return out

    def _only_prefills(self, num_tokens: int) -> bool:
        """What shapes alone can tell: a single request that has several queries."""
        return self._seq_lens.shape[0] == 1 and num_tokens > 1

    def _decode(
        self, q: Tensor, cache_arguments: tuple[Tensor | None, ...], rest: tuple[object, ...], sinks: Tensor | None,
        out: Tensor, block_size: int,
    ) -> None:  # fmt: skip
        heads, (_, value_dim) = self._num_heads, self._dims
        partials = torch.empty((self._max_splits, heads, value_dim), dtype=torch.float32, device=q.device)
        logs = torch.empty((self._max_splits, heads), dtype=torch.float32, device=q.device)
        columns = self._num_kv_heads * -(-self._group // self._decode_tile["BLOCK_H"])
        grid = (min(self._max_splits, max(tiles.MAX_PROGRAMS // columns, 1)), columns)
        decode.split_kernel[grid](
            q, *cache_arguments, partials, logs, *self._decode_items, *rest, BLOCK_SIZE=block_size, **self._decode_tile
        )
        decode.combine_kernel[self._seq_lens.shape[0], heads](
            partials, logs, sinks, out, self._decode_items[1], self._query_starts, heads, **self._combine_tile
        )


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """``k [T,K,D], v [T,K,Dv]`` into the cache at ``slot_mapping i64 [T]``; see ``reference.store_kv``."""
    num_tokens, num_kv_heads, dim = k.shape
    if num_tokens == 0:
        return
    (k, *k_strides), (v, *v_strides) = _rows(k), _rows(v)
    key_cache, value_cache = _bits(cache.keys), _bits(cache.values)
    key_scales, value_scales = cache.key_scales, cache.value_scales
    tile = tiles.store(num_kv_heads, dim, v.shape[2])
    with _on(k.device):
        store.store_kernel[num_tokens, -(-num_kv_heads // tile["HEADS"])](
            k, v, key_cache, value_cache, key_scales, value_scales, slot_mapping.contiguous(), num_kv_heads,
            *k_strides, *v_strides, key_cache.stride(0), value_cache.stride(0),
            None if key_scales is None else key_scales.stride(0), BLOCK_SIZE=key_cache.shape[2], **tile,
        )  # fmt: skip


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks (source, target) in every cache ``[blocks, ...]``, one pair after another."""
    for together in _independent(pairs):
        move_blocks(caches, caches, together)


def move_blocks(sources: Sequence[Tensor], targets: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block ``pair[0]`` of each source to block ``pair[1]`` of the target beside it, all pairs at once: from a
    cache to a staging tensor, or back. A tensor in pinned host memory will do for either."""
    for device in dict.fromkeys(_kernel_device(pair) for pair in zip(sources, targets, strict=True)):
        mine = [pair for pair in zip(sources, targets, strict=True) if _kernel_device(pair) == device]
        block_bytes = [source[0].numel() * source.element_size() for source, _ in mine]
        word = next(size for size in _WORDS if all(count % size == 0 for count in block_bytes))
        numbers = [number for pair in pairs for number in pair]
        for (source, target), count in zip(mine, block_bytes, strict=True):
            assert source[0].is_contiguous() and target[0].is_contiguous() and source.stride(0) == target.stride(0)
            numbers += [source.data_ptr(), target.data_ptr(), count // word]
        # The host would wait for a copy from memory that isn't pinned.
        given = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        num_words = max(block_bytes) // word
        grid = (len(pairs), len(mine), -(-num_words // tiles.COPY_TILE["NUM_WORDS"]))
        unit = torch.empty(0, dtype=_WORDS[word], device=device)
        with _on(device):
            store.copy_kernel[grid](given[2 * len(pairs) :], given, unit, **tiles.COPY_TILE)


def paged_attention(
    q: Tensor, cache: LayerCache, query_starts: Tensor, seq_lens: Tensor, block_tables: Tensor, extras: Extras
) -> Tensor:
    """Causal attention of packed queries over the blocks of their own request; see ``reference.paged_attention``."""
    dims = (q.shape[1], cache.keys.shape[1], q.shape[2], cache.values.shape[3])
    plan = AttentionPlan(*dims, extras.sliding_window, q.dtype, cache.keys.dtype, cache.keys.shape[2])
    longest = block_tables.shape[1] * cache.keys.shape[2]
    no_slots = torch.empty(0, dtype=torch.int64, device=q.device)
    plan.plan(query_starts, seq_lens, block_tables, no_slots, q.shape[0], longest)
    return plan.run(q, None, None, cache, extras)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say. It is asked before it is set: that is faster."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def _items(count: int, num_requests: int, device: torch.device, width: int = 1) -> tuple[Tensor, Tensor]:
    """Room for a list of work: what each item is for, in ``width`` numbers, and the first item of each request."""
    both = torch.empty(count * width + num_requests + 1, dtype=torch.int32, device=device)
    return both[: count * width], both[count * width :]


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x with each row's numbers side by side, and its strides from token to token and from head to head."""
    num_tokens, num_heads, dim = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    # Of an axis of one the stride may be anything, and each kind of stride would be compiled for.
    head = x.stride(1) if num_heads > 1 else dim
    return x, x.stride(0) if num_tokens > 1 else num_heads * head, head


def _bits(cache: Tensor) -> Tensor:
    """A cache as kernels read it: whole blocks in one piece, e4m3 as its bits."""
    assert cache[0].is_contiguous(), "a block is one piece of memory"
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


def _independent(pairs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Stretches of pairs that may be copied in any order: none touches another's target."""
    together: list[tuple[int, int]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in pairs:
        if source in written or target in written or target in read:
            yield together
            together, read, written = [], set(), set()
        together.append((source, target))
        read.add(source)
        written.add(target)
    if together:
        yield together


def _kernel_device(pair: tuple[Tensor, Tensor]) -> torch.device:
    """Where two tensors are copied: on the GPU, if one of them is in host memory."""
    source, target = pair
    return target.device if source.device.type == "cpu" else source.device

"""PagedCache: a transformers cache that keeps K/V in blocks, for models and decoding loops that the engine can't run.

Stock's own loops run over it. They see dense K/V for the attention call and nothing of blocks. Rows that share a past
(beams, samples) share its blocks. Layers that keep something else than all K/V (windows, recurrent states) stay stock's
own. A cache owns its memory and frees it when it is dropped. This file knows neither models nor loops.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, PreTrainedConfig

from paged_core import UnsupportedModel
from paged_hf.cache.block_tables import BlockTables
from paged_hf.upstream import CROPS_TO_LENGTH

_NO_BLOCKS = torch.empty(0, 0, dtype=torch.int64, device="cpu")


class PagedCache(DynamicCache):  # type: ignore[misc]
    """In place of ``DynamicCache(config=config)``: the same answers from K/V in blocks.

    ``layer.keys`` and ``layer.values`` are copies, made when they are read. Writing to them raises an error at the next
    update.

    Args:
        config: of the model that will use it.
        block_size: tokens in a block.

    Raises:
        UnsupportedModel: no layer keeps all its K/V, so that there is nothing to page.
    """

    def __init__(self, config: PreTrainedConfig, block_size: int = 16) -> None:
        super().__init__(config=config)
        self.layers: list[Any]
        self._config = config
        kinds = sorted({type(layer).__name__ for layer in self.layers})
        self.layers = [PagedLayer(block_size) if type(layer) is DynamicLayer else layer for layer in self.layers]
        if not self._paged_layers:
            raise UnsupportedModel(f"no layer of {type(config).__name__} keeps all its K/V: {', '.join(kinds)}")

    @property
    def num_blocks_used(self) -> int:
        """Blocks in use, summed over the layers."""
        return sum(layer.tables.pool.num_used for layer in self._paged_layers)

    @property
    def num_blocks_shared(self) -> int:
        """Blocks that would be in use beside ``num_blocks_used`` if rows did not share."""
        return sum(layer.tables.pool.num_shared for layer in self._paged_layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # waits for the device once, not per layer

    def to_dynamic(self) -> DynamicCache:
        """A stock cache of its own with the same content."""
        cache = DynamicCache(config=self._config)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, PagedLayer):
                cache.layers[index] = copy.deepcopy(layer)
            elif layer.is_initialized:
                cache.layers[index].update(layer._gather(0), layer._gather(1))
        return cache

    @property
    def _paged_layers(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]


class PagedLayer(DynamicLayer):  # type: ignore[misc]
    """K/V of one layer in blocks, behind the interface of stock's layer.

    B rows, K kv heads, T new tokens, D head dim. K and V may differ in D and dtype.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.tables = BlockTables(block_size)
        self._located = -1  # the version of the tables that _table and _run are of
        self._table = _NO_BLOCKS  # int64 [B, blocks]
        self._run: int | None = None  # the first block of a single row whose blocks are consecutive
        self._blocks: tuple[_Blocks, ...] = ()  # of K, and of V
        self._shown: list[tuple[Tensor, int]] = []  # copies that were read since the last update, and their versions

    @property
    def keys(self) -> Tensor | None:  # [B, K, num_tokens, D]
        return self._show(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        _refuse(value, "keys")

    @property
    def values(self) -> Tensor | None:  # [B, K, num_tokens, D]
        return self._show(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        _refuse(value, "values")

    def _show(self, which: int) -> Tensor | None:
        if not self.is_initialized:
            return None
        copy = self._gather(which)
        if not copy.is_inference():
            self._shown.append((copy, copy._version))
        return copy

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._blocks = tuple(_Blocks(states, self.tables.pool.block_size) for states in (key_states, value_states))
        self.tables.start(key_states.shape[0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep K/V of T tokens, both [B, K, T, D]; return those of all tokens so far, both [B, K, num_tokens, D]."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("PagedCache keeps no gradients: use torch.no_grad(), or transformers' DynamicCache")
        if any(copy._version != version for copy, version in self._shown):
            raise RuntimeError(
                "keys or values of a paged layer were written in place, which changes copies only: "
                "let the decoding loop run on transformers' own cache (model.generate.stock)"
            )
        self._shown.clear()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, num_rows = self.tables.num_tokens, len(self.tables.rows)
        if start == 0:
            self.tables.start(key_states.shape[0])
        elif key_states.shape[0] != num_rows:
            raise ValueError(f"the cache holds {num_rows} rows, the new keys have {key_states.shape[0]}")
        copies = self.tables.extend(key_states.shape[2])
        self._locate()
        run, end = self._run, self.tables.num_tokens
        slots = self._slots(start, end) if run is None else None
        for blocks, states in zip(self._blocks, (key_states, value_states), strict=True):
            blocks.fit(self.tables.pool.num_blocks + 1, states.dtype)  # block ids begin with 1
            if copies:
                blocks.copy(*torch.tensor(copies, device=self.device).T)
            if run is not None:
                blocks.span(run, start, end).copy_(states)
            elif slots is not None:
                blocks.store(slots, states)
        return (key_states, value_states) if start == 0 else (self._read(0), self._read(1))

    def get_seq_length(self) -> int:
        return self.tables.num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens at the end: a negative number says how many; a positive one is the length that remains."""
        tokens_to_remove = int(tokens_to_remove)  # some versions bring a tensor, which += would change in place
        if tokens_to_remove > 0 or (tokens_to_remove == 0 and CROPS_TO_LENGTH):
            self.tables.crop(tokens_to_remove)
        elif tokens_to_remove < 0:
            self.tables.crop(max(0, self.tables.num_tokens + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.tables.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.tables.rows))[indices.cpu()].tolist())  # numbers or a mask

    def reset(self) -> None:
        self.is_initialized = False
        self.tables = BlockTables(self.tables.pool.block_size)
        self._located, self._table, self._run, self._blocks = -1, _NO_BLOCKS, None, ()

    def offload(self) -> None:
        for blocks in self._blocks:
            blocks.move("cpu")

    def prefetch(self) -> None:
        for blocks in self._blocks:
            blocks.move(self.device)

    def _select(self, parents: Sequence[int]) -> None:
        if self.tables.num_tokens:
            self.tables.select(parents)

    def _locate(self) -> None:
        """Make tensors of the tables, if they have changed."""
        if self._located != self.tables.version:
            rows = self.tables.rows
            self._table = torch.tensor(rows, dtype=torch.int64, device=self.device)
            self._run = rows[0][0] if len(rows) == 1 and _are_in_order(list(rows[0])) else None
            self._located = self.tables.version

    def _slots(self, start: int, end: int) -> Tensor:
        """Where tokens start..end of all rows are: int64 [B * (end - start)]."""
        block_size = self.tables.pool.block_size
        first, offset = divmod(start, block_size)
        slots = self._table[:, first:, None] * block_size + torch.arange(block_size, device=self.device)
        return slots.flatten(1)[:, offset : offset + end - start].flatten()

    def _read(self, which: int) -> Tensor:
        """K (0) or V (1) of all tokens, for one attention call."""
        if self._run is not None:
            return self._blocks[which].span(self._run, 0, self.tables.num_tokens)
        return self._gather(which)

    def _gather(self, which: int) -> Tensor:
        self._locate()
        return self._blocks[which].gather(self._table, self.tables.num_tokens)


class _Blocks:
    """K or V of one layer: ``data`` [K, num_blocks, block_size, D]."""

    def __init__(self, states: Tensor, block_size: int) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written to later, outside of that mode
            self.data = states.new_empty((states.shape[1], 0, block_size, states.shape[3]))
        self._indexed: Tensor | None = None  # the table that _index was made from
        self._index = _NO_BLOCKS  # int64 [B * K * blocks]: heads' blocks, counted through data

    def fit(self, num_blocks: int, dtype: torch.dtype) -> None:
        """Memory for so many blocks, in a dtype that holds the new states too (torch.cat's promotion)."""
        dtype = torch.promote_types(self.data.dtype, dtype)
        num_heads, before, block_size, head_dim = self.data.shape
        if num_blocks > before or dtype != self.data.dtype:
            with torch.inference_mode(False):
                data = self.data.new_empty((num_heads, max(num_blocks, before), block_size, head_dim), dtype=dtype)
                data[:, :before] = self.data
            self.data = data

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks: int64 [N] each."""
        self.data.index_copy_(1, targets, self.data.index_select(1, sources))

    def store(self, slots: Tensor, states: Tensor) -> None:
        """Write ``states`` [B, K, T, D] to ``slots`` int64 [B * T]."""
        num_heads, num_blocks, block_size, head_dim = self.data.shape
        states = states.transpose(0, 1).flatten(1, 2).to(self.data.dtype)  # [K, B * T, D]
        self.data.view(num_heads, num_blocks * block_size, head_dim).index_copy_(1, slots, states)

    def span(self, first: int, start: int, end: int) -> Tensor:
        """Tokens start..end of a row whose blocks are consecutive from ``first``: a view [1, K, end - start, D]."""
        num_heads, num_blocks, block_size, head_dim = self.data.shape
        slots = self.data.view(1, num_heads, num_blocks * block_size, head_dim)
        return slots[:, :, first * block_size + start : first * block_size + end]

    def gather(self, table: Tensor, num_tokens: int) -> Tensor:
        """The rows of ``table`` [B, blocks]: a copy [B, K, num_tokens, D]."""
        num_heads, num_blocks, block_size, head_dim = self.data.shape
        if self._indexed is not table:  # a table is made anew whenever blocks were added to data
            heads = torch.arange(num_heads, device=table.device)[:, None] * num_blocks
            self._indexed, self._index = table, (table[:, None] + heads).flatten()
        dense = self.data.view(num_heads * num_blocks, block_size * head_dim).index_select(
            0, self._index.to(self.data.device)
        )
        return dense.view(len(table), num_heads, table.shape[1] * block_size, head_dim)[:, :, :num_tokens]

    def move(self, device: torch.device | str) -> None:
        with torch.inference_mode(False):
            self.data = self.data.to(device, non_blocking=True)


def _are_in_order(blocks: list[int]) -> bool:
    return bool(blocks) and blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def _refuse(value: Tensor | None, name: str) -> None:
    if value is not None:  # stock's constructor sets None
        raise AttributeError(f"{name} of a paged layer can't be set: change those of PagedCache.to_dynamic() instead")

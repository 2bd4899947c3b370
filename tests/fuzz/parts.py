"""Parts of an episode's engine: attention in float64, memory full of NaN, a sampler that may run out of memory, a
tier."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from paged_core import Fetch, Piece, hookimpl
from paged_core.builtin.attention import layer_cache
from paged_core.execution import kv_cache
from paged_core.sampling.sampler import Sampler
from paged_core.tiers.costs import TierCosts
from paged_core.tiers.host import HostTier
from paged_kernels import reference

_SILENCE_S = 0.2  # how long to wait for a load of a tier that stays silent; there are many


class ExactBackend:
    """Computes like the reference, but in float64, and for all queries at once."""

    name = "exact"
    reads_scales = True

    def __init__(self, spec, block_size: int) -> None:
        self._layers, self._block_size = spec.layers, block_size

    def plan(self, metadata) -> None:
        starts, seq_lens = metadata.query_starts.long(), metadata.seq_lens.long()
        row = torch.arange(len(seq_lens)).repeat_interleave(starts.diff())  # [T]
        queries = seq_lens[row] - starts[row + 1] + torch.arange(len(row))  # [T]
        keys = torch.arange(metadata.max_seq_len)  # [L]
        slots = metadata.block_tables.long()[row][:, keys // self._block_size] * self._block_size
        slots += keys % self._block_size  # [T,L]
        distances, self._own = queries[:, None] - keys, metadata.slot_mapping
        self._seen = {window: _seen(distances, window) for window in {layer.sliding_window for layer in self._layers}}
        # Slots that a query does not see may hold anything, so the query's own slot is read instead.
        self._slots = {window: slots.where(seen, self._own[:, None]) for window, seen in self._seen.items()}

    def run(self, layer, q, k, v, cache, sinks=None, key_bias=None) -> Tensor:
        facts, part = self._layers[layer], layer_cache(cache, layer)
        reference.store_kv(k, v, part, self._own)
        slots, seen = self._slots[facts.sliding_window], self._seen[facts.sliding_window]
        places = slots // self._block_size, slots % self._block_size
        keys = _gather(part.keys, part.key_scales, *places)  # [T,L,K,D]
        values = _gather(part.values, part.value_scales, *places)
        q = q.reshape(len(q), keys.shape[2], -1, q.shape[-1])  # [T,K,G,D]
        scores = (q @ keys.permute(0, 2, 3, 1)) * facts.scale  # [T,K,G,L]
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        return (weights @ values.transpose(1, 2)).flatten(1, 2)  # [T,H,D]

    def copy_blocks(self, cache, pairs) -> None:
        reference.copy_blocks(cache.tensors, pairs)


def _seen(distances: Tensor, window: int | None) -> Tensor:
    return (distances >= 0) if window is None else (distances >= 0) & (distances < window)


def _gather(cache: Tensor, scales: Tensor | None, blocks: Tensor, offsets: Tensor) -> Tensor:
    if scales is None:
        return cache[blocks, :, offsets]
    codes = cache.view(torch.uint8)[blocks, :, offsets].view(cache.dtype)
    return (codes.float() * scales[blocks, :, offsets][..., None]).double()


def spoil(cache: kv_cache.KVCache, blocks: list[int]) -> None:
    """Write NaN into blocks that no request holds, so that reading them is noticed."""
    for tensor in cache.key_scales + cache.value_scales or cache.tensors:
        tensor[blocks] = float("nan")


class CrampedSampler(Sampler):
    """A sampler that can be given memory for only so many rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.room: int | None = None

    def select(self, logits, requests):
        if self.room is not None and len(requests) > self.room:
            raise torch.OutOfMemoryError(f"no room for {len(requests)} rows")
        return super().select(logits, requests)


class FickleTier:
    """A tier that keeps blocks in memory, loses some, and returns the others at random times, piece by piece, or
    never."""

    key = None

    def __init__(self, block_bytes: int, rnd: random.Random) -> None:
        self._rnd = rnd
        self._memory = HostTier(rnd.choice((2, 10, 200)) * block_bytes, block_bytes, pinned=False)
        self._coming: list[tuple[Fetch, list[Piece]]] = []
        self.wants_more = True

    @property
    def stats(self):
        return self._memory.stats

    def holds(self, digest):
        self.move()
        return self._memory.holds(digest)

    def store(self, contents, data):
        if self._rnd.random() < 0.9:
            self._memory.store(contents, data)

    def fetch(self, contents, arrived):
        fetch = Fetch(contents, arrived)
        (whole,) = self._memory.fetch(contents, arrived).take()
        cut = self._rnd.randrange(len(contents) + 1)
        pieces = []
        for rows in (range(cut), range(cut, len(contents))):
            good = [whole.good[row] and self._rnd.random() < 0.97 for row in rows]
            pieces.append(Piece(rows, whole.data[rows.start : rows.stop], good))
        self._coming.append((fetch, pieces))
        self.move()
        return fetch

    def move(self):
        """Let one piece arrive, or nothing."""
        for fetch, pieces in list(self._coming):
            if self._rnd.random() < 0.3:
                if pieces:
                    fetch.put(pieces.pop())
                else:
                    fetch.finish()
                    self._coming.remove((fetch, pieces))

    def give_back(self, piece):
        piece.data.fill_(255)  # NaN, for code that reads it afterwards

    def forget(self):
        self._memory.forget()

    def flush(self, timeout_s):
        return True

    def close(self, timeout_s):
        self._memory.close(timeout_s)


def count_on_luck(costs: TierCosts, rnd: random.Random) -> None:
    """Replace measured speeds by random decisions."""
    costs._to_spend_s = float("inf")
    costs.pays_beside = lambda num_blocks, num_tokens: rnd.random() < 0.5
    costs.num_to_compute = lambda num_blocks, num_tokens: rnd.randrange(num_tokens + 1)
    honest = costs.patience_s
    costs.patience_s = lambda num_tokens: min(honest(num_tokens), _SILENCE_S)


class Parts:
    """The plugin with these parts. It is an observer too, which sometimes raises.

    ``tier``: random numbers for a tier's behaviour; None: there is no tier.
    """

    def __init__(self, tier: random.Random | None = None) -> None:
        self.sampler = CrampedSampler()
        self._num_told = 0
        self._tier_rnd = tier
        self.tier: FickleTier | None = None

    @hookimpl
    def create_offload_tier(self, layout):
        if self._tier_rnd is not None:
            self.tier = FickleTier(layout.block_bytes, self._tier_rnd)
        return self.tier

    @hookimpl
    def create_attention_backend(self, name, spec, config):
        return ExactBackend(spec, config.block_size) if name == "exact" else None

    @hookimpl
    def create_kv_cache(self, spec, num_blocks, config):
        if config.kv_cache_slab_bytes is not None:
            return None  # then the core makes one, which grows
        dtype = getattr(torch, config.kv_cache_dtype) if config.kv_cache_dtype else spec.dtype
        cache = kv_cache.allocate(spec, num_blocks, config.block_size, dtype, max_blocks=config.num_blocks)
        spoil(cache, list(range(1, num_blocks + 1)))
        return cache

    @hookimpl
    def create_sampler(self, spec):
        return self.sampler

    @hookimpl
    def on_step_finished(self, stats):
        self._num_told += 1
        if self._num_told % 7 == 0:
            raise ValueError("an observer of no use")

"""An engine whose cache grows by two blocks at a time."""

import torch

from paged_core import (
    Engine,
    EngineConfig,
    KVCache,
    hookimpl,
)
from tiny_model import VOCAB, TinyModel

BLOCK = 4
BLOCK_BYTES = 2 * 2 * BLOCK * 2 * 16 * 4  # layers, K and V, slots, kv heads, head dim, float32


class Copying:
    """A cache that grows as on a GPU: with new memory and a copy."""

    @hookimpl
    def create_kv_cache(self, spec, num_blocks, config):
        shape = (3, spec.layers[0].num_kv_heads, config.block_size, spec.layers[0].head_dim)
        keys, values = ([torch.full(shape, float("nan")) for _ in spec.layers] for _ in range(2))
        return KVCache(tuple(keys), tuple(values), config.block_size, max_blocks=num_blocks)


def make_engine(model=None, plugins=(), **config):
    usual = {
        "block_size": BLOCK,
        "num_blocks": 400,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "attention_backend": "reference",
        "seed": 0,
        "kv_cache_slab_bytes": 2 * BLOCK_BYTES,
    }
    return Engine(model or TinyModel(), EngineConfig(**{**usual, **config}), plugins=plugins)


def run(engine):
    tokens = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault((output.request.id, output.request.index), []).extend(output.token_ids)
        engine.check()
        assert engine.memory.num_blocks_backed >= engine._pool.num_backed
    return tokens


def prompt_of(length, seed=0):
    return torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

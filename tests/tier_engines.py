"""Engines with tiers, and helpers for their tests."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

from paged_core import Engine, EngineConfig, Piece, SamplingParams, hookimpl
from paged_core.tiers import host
from paged_core.tiers.tier import Fetch
from tiny_model import LAYERS, TinyModel

SMALL = EngineConfig(
    block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=32, attention_backend="reference"
)


def on_disk(path, config=SMALL, **options):
    return Engine(TinyModel(), replace(config, kv_disk_path=str(path), kv_disk_bytes=50_000_000), **options)


def prompts_like(seed, num):
    """Return many prompts with common beginnings."""
    rnd = random.Random(seed)
    families = [[rnd.randrange(90) for _ in range(60)] for _ in range(5)]
    return [
        [*rnd.choice(families)[: rnd.randrange(1, 60)], *(rnd.randrange(90) for _ in range(rnd.randrange(1, 4)))]
        for _ in range(num)
    ]


def answers(engine, prompts, **params):
    params = {"temperature": 0, "max_tokens": 9, "ignore_eos": True} | params
    told, ends = {}, []
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SamplingParams(**params))
    while engine.has_work:
        for output in engine.step():
            told.setdefault((output.request.id, output.request.index), []).extend(output.token_ids)
            ends += [output.request] if output.finish_reason is not None else []
        engine.check()
    assert len(ends) == len(set(ends)) == len(told)
    assert engine.memory.num_blocks_used == 0
    return told


def stats(engine):
    return engine.last_stats.offloading


def filled_and_evicted(engine, prompt):
    """Return the engine with the prompt's blocks in the tier, and no longer in the cache."""
    answers(engine, [prompt], max_tokens=1)
    engine.save_prefix_cache(30)
    engine.release_memory()
    engine._offloading._costs.tokens_per_s = None  # while speed is not measured, loads are waited for


class Slow:
    """A tier in memory whose loads end when the test says so."""

    key = None
    wants_more = True

    def __init__(self):
        self.inner = host.HostTier(1 << 20, TINY_BLOCK, pinned=False)
        self.asked = []
        self.closed = False

    @hookimpl
    def create_offload_tier(self):
        return self

    @property
    def stats(self):
        return self.inner.stats

    def holds(self, digest):
        return self.inner.holds(digest)

    def store(self, contents, data):
        self.inner.store(contents, data)

    def fetch(self, contents, arrived):
        fetch = Fetch(contents, arrived)
        self.asked.append((fetch, contents))
        return fetch

    def land(self):
        for fetch, contents in self.asked:
            for piece in self.inner.fetch(contents, threading.Event()).take():
                fetch.put(piece)
            fetch.finish()
        self.asked.clear()

    def bring(self, start, stop):
        """Let some of the blocks arrive that were asked for last."""
        fetch, contents = self.asked[-1]
        (piece,) = self.inner.fetch(contents[start:stop], threading.Event()).take()
        fetch.put(piece._replace(places=range(start, stop)))

    def give_back(self, piece: Piece):
        pass

    def forget(self):
        self.inner.forget()

    def flush(self, timeout_s):
        return True

    def close(self, timeout_s):
        self.closed = True


TINY_BLOCK = 4 * 2 * 16 * 4 * 2 * LAYERS  # tokens, heads, head_dim, bytes, K and V, layers

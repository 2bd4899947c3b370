"""Draws an episode's sizes, of which most are too small for the requests."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fuzz.model import Kind
from paged_core import EngineConfig

_WINDOWS = ((None,), (None,), (5,), (9,), (None, 6))


@dataclass(frozen=True)
class Setting:
    kind: Kind
    config: EngineConfig
    tier: bool  # whether there is a tier


def draw_kind(rnd: random.Random) -> Kind:
    return Kind(rnd.choice(_WINDOWS), rnd.choice((None, None, None, "int8", "float8_e4m3fn")))


def draw_setting(kind: Kind, rnd: random.Random) -> Setting:
    num_seqs = rnd.randrange(1, 8)
    block_size = rnd.choice((1, 2, 4, 4, 8, 16))
    tier = rnd.random() < 0.5
    num_slots = rnd.choice((24, 30, 40) if tier else (24, 40, 60, 90, 400))  # with a tier, few: blocks must be evicted
    config = EngineConfig(
        block_size=block_size,
        num_blocks=max(3, num_slots // block_size),
        kv_cache_slab_bytes=rnd.choice((None, None, 1, 9000)),
        kv_cache_dtype=kind.kv_dtype,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs + rnd.choice((0, 1, 3, 8, 30)),
        max_model_len=rnd.choice((24, 48, 200)),
        enable_prefix_caching=tier or rnd.random() < 0.6,
        scheduling_policy=rnd.choice(("fcfs", "priority")),
        attention_backend="exact",
        watermark=rnd.choice((0.0, 0.0, 0.1, 0.3)),
        lookahead=rnd.random() < 0.5,
        seed=0,
        max_prompt_logprob_rows=rnd.choice((1, 3, 256)),
    )
    return Setting(kind, config, tier)

"""Blocks in memory beside the device."""

from __future__ import annotations

import pytest

from paged_core import ConfigError
from paged_core.tiers.host import HostTier
from tier_blocks import BLOCK_BYTES, content, sound, store


def test_it_keeps_as_many_as_fit_and_gives_up_what_was_of_use_longest_ago():
    tier = HostTier(3 * BLOCK_BYTES, BLOCK_BYTES, pinned=False)
    store(tier, 1, 2, 3)
    assert sound(tier, 1) == [1]
    store(tier, 4)
    assert sound(tier, 1, 2, 3, 4) == [1, 3, 4]
    assert tier.stats.blocks_out == 4


def test_another_salts_blocks_are_not_found():
    tier = HostTier(3 * BLOCK_BYTES, BLOCK_BYTES, pinned=False)
    store(tier, 1, salt="a")
    assert sound(tier, 1) == []
    assert tier.holds(content(1).digest)


def test_after_a_change_of_the_model_it_is_empty():
    tier = HostTier(2 * BLOCK_BYTES, BLOCK_BYTES, pinned=False)
    store(tier, 1, 2)
    tier.forget()
    assert sound(tier, 1, 2) == []
    store(tier, 3, 4)
    assert sound(tier, 3, 4) == [3, 4]


def test_too_little_memory_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=rf"kv_host_bytes \(10\) holds no block, which takes {BLOCK_BYTES} bytes"):
        HostTier(10, BLOCK_BYTES, pinned=False)

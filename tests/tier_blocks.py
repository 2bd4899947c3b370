"""Blocks for tests of tiers, each with contents of its own."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from paged_core.scheduling.block_pool import BlockContent
from paged_core.tiers.disk import DiskTier
from paged_core.tiers.folder import SlabFolder
from paged_core.tiers.slab import Shape

BLOCK_SIZE, BLOCK_BYTES = 4, 1024
SHAPE = Shape("ab" * 16, BLOCK_BYTES, BLOCK_SIZE)
PATIENCE_S = 30.0


def content(number: int, salt: str | None = None) -> BlockContent:
    tokens = tuple(number * 10 + i for i in range(BLOCK_SIZE))
    return BlockContent(number + 1, number.to_bytes(16, "big"), tokens, salt)


def bytes_of(number: int) -> torch.Tensor:
    return torch.randint(256, (BLOCK_BYTES,), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def disk_tier(path: Path, num_bytes: int = 1 << 20, shape: Shape = SHAPE) -> DiskTier:
    return DiskTier(SlabFolder(str(path), num_bytes), shape)


def store(tier, *numbers: int, salt: str | None = None) -> None:
    tier.store([content(number, salt) for number in numbers], torch.stack([bytes_of(number) for number in numbers]))
    assert tier.flush(PATIENCE_S)


def fetched(tier, contents) -> list[torch.Tensor | None]:
    """Return the contents of each block, or None if it is lost."""
    arrived = threading.Event()
    fetch = tier.fetch(contents, arrived)
    found: list[torch.Tensor | None] = [None] * len(contents)
    while True:
        assert arrived.wait(PATIENCE_S)
        arrived.clear()
        done = fetch.done
        for piece in fetch.take():
            for row, place in enumerate(piece.places):
                if piece.good[row]:
                    found[place] = piece.data[row].clone()
            tier.give_back(piece)
        if done:
            return found


def sound(tier, *numbers: int, salt: str | None = None) -> list[int]:
    """Return which of ``numbers`` can be loaded, and assert that their contents are unchanged."""
    found = fetched(tier, [content(number, salt) for number in numbers])
    for number, data in zip(numbers, found, strict=True):
        assert data is None or torch.equal(data, bytes_of(number)), f"block {number} is another's"
    return [number for number, data in zip(numbers, found, strict=True) if data is not None]

"""The changes of a prefix index, for routers and other processes that keep a copy of it.

Events are in the order in which the changes happened. Nothing here knows who listens.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class BlockStored(NamedTuple):
    """A full block can be found from now on."""

    digest: bytes  # 16 bytes, of its tokens and all before them
    parent: bytes | None  # the digest of the block before it; None: it is the first of its sequence
    tokens: tuple[int, ...]  # as many as a block has slots
    salt: str | None = None  # the cache_salt, which keeps it apart from other tenants' blocks


class BlockRemoved(NamedTuple):
    """A block can't be found any more: it was evicted, or its K/V can't be trusted."""

    digest: bytes


class AllBlocksCleared(NamedTuple):
    """No block can be found any more: the model has changed, or the memory was freed."""


CacheEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared

"""What changes in a prefix index, for those who keep a picture of it elsewhere: routers, and other processes.

They are told in the order in which they happened. Nobody here knows who listens.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class BlockStored(NamedTuple):
    """A full block can be found from now on."""

    digest: bytes  # 16 bytes, of its tokens and all before them
    parent: bytes | None  # the digest of the block before it; None: it is the first of its sequence
    tokens: tuple[int, ...]  # as many as a block has slots
    salt: str | None = None  # that keeps it apart from other tenants' blocks


class BlockRemoved(NamedTuple):
    """A block can't be found any more: it was evicted, or its K/V are not to be trusted."""

    digest: bytes


class AllBlocksCleared(NamedTuple):
    """No block can be found: the model has changed, or the memory was given back."""


CacheEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared

"""OffloadTier: what a tier must do. Fetch: blocks that a tier is loading.

A tier knows blocks by their digests. It does not know requests, nor the cache's layout: a block is a number of bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from torch import Tensor

from paged_core.scheduling.block_pool import BlockContent
from paged_core.tiers.stats import TierStats


@dataclass(frozen=True)
class BlockLayout:
    """The facts of an engine's blocks that tiers need."""

    block_bytes: int  # of a packed block
    block_size: int  # tokens
    fingerprint: Callable[[], str | None]  # 32 hexadecimal digits, equal only where K/V are: for the same weights,
    # layout and code. Computing it takes a while. None: there is none


class Piece(NamedTuple):
    """Some of the blocks that were asked for."""

    places: Sequence[int]  # indices into the contents of the Fetch
    data: Tensor  # u8 [n, block_bytes] on the CPU
    good: Sequence[bool]  # whether each is the block that was asked for
    busy_s: float = 0.0  # how long the tier worked on it; 0: this says nothing of its speed


class Fetch:
    """Blocks that a tier is loading. A tier's thread puts them in piece by piece, in their order. The engine takes them
    out between steps.

    Args:
        contents: the blocks that are wanted.
        arrived: set whenever a piece comes, or the last one has come.
    """

    def __init__(self, contents: Sequence[BlockContent], arrived: threading.Event) -> None:
        self.contents = contents
        self.cancelled = False  # whether the rest is no longer wanted
        self.done = False  # whether all pieces have come
        self._arrived = arrived
        self._pieces: SimpleQueue[Piece] = SimpleQueue()

    def put(self, piece: Piece) -> None:
        self._pieces.put(piece)
        self._arrived.set()

    def finish(self) -> None:
        """Note that no more pieces follow. Blocks that are in none of them are lost."""
        self.done = True
        self._arrived.set()

    def take(self) -> list[Piece]:
        """Return the pieces that have come since the last call."""
        pieces = []
        while True:
            try:
                pieces.append(self._pieces.get_nowait())
            except Empty:
                return pieces


class OffloadTier(Protocol):
    """Stores blocks that the cache evicts. All calls come from the engine's thread and return at once, except ``flush``
    and ``close``. None raises: a block that can't be loaded is lost, and a warning says so once."""

    @property
    def key(self) -> bytes | None:
        """32 secret bytes that digests must be made with. None: the engine uses its own key, because no other process
        reads them."""
        ...

    @property
    def wants_more(self) -> bool:
        """Whether the tier can write more blocks now."""
        ...

    @property
    def stats(self) -> TierStats: ...

    def holds(self, digest: bytes) -> bool:
        """Return whether a block of this digest can be fetched, as far as is known."""
        ...

    def store(self, contents: Sequence[BlockContent], data: Tensor) -> None:
        """Keep copies of blocks, ``data u8 [n, block_bytes]`` on the CPU, which the tier owns from now on. It may drop
        some, because no step waits for it."""
        ...

    def fetch(self, contents: Sequence[BlockContent], arrived: threading.Event) -> Fetch:
        """Load blocks. A block that is not exactly the one asked for (digest, tokens, salt) is lost."""
        ...

    def give_back(self, piece: Piece) -> None:
        """Take back a piece whose data were copied, or are not wanted."""
        ...

    def forget(self) -> None:
        """Let this engine find nothing any more that was stored before, because the model has changed."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until all stored blocks are written. Returns False if that takes longer."""
        ...

    def close(self, timeout_s: float) -> None:
        """Finish writing as far as time allows, and release all resources."""
        ...

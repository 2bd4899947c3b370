"""What a tier must do, and how blocks come back from one.

A tier knows blocks by their digests. It does not know requests, nor the cache's layout: a block is so many bytes.
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
    """What tiers know of an engine's blocks."""

    block_bytes: int  # packed
    block_size: int  # tokens
    fingerprint: Callable[[], str | None]  # 32 hexadecimal digits, equal only where K/V are: the same weights, the same
    #                                        layout, the same code. It takes a while. None: it can't be told


class Piece(NamedTuple):
    """Some of the blocks asked for."""

    places: Sequence[int]  # among the contents of the Fetch
    data: Tensor  # u8 [n, block_bytes] on the CPU
    good: Sequence[bool]  # whether each is what was asked for
    busy_s: float = 0.0  # that the tier was at it; 0: that tells nothing of its speed


class Fetch:
    """Blocks on their way. A tier's thread puts them in piece by piece, in their order; the engine takes them out
    between steps.

    Args:
        contents: what is wanted.
        arrived: set whenever there is news.
    """

    def __init__(self, contents: Sequence[BlockContent], arrived: threading.Event) -> None:
        self.contents = contents
        self.cancelled = False  # whether the rest need not come
        self.done = False  # whether all pieces are there
        self._arrived = arrived
        self._pieces: SimpleQueue[Piece] = SimpleQueue()

    def put(self, piece: Piece) -> None:
        self._pieces.put(piece)
        self._arrived.set()

    def finish(self) -> None:
        """No more pieces follow. What is in none of them is lost."""
        self.done = True
        self._arrived.set()

    def take(self) -> list[Piece]:
        """The pieces that have come since the last time."""
        pieces = []
        while True:
            try:
                pieces.append(self._pieces.get_nowait())
            except Empty:
                return pieces


class OffloadTier(Protocol):
    """Where blocks go that the cache gives up. All calls come from the engine's thread and return at once, but
    ``flush`` and ``close``. None raises: what can't be had is lost, and a warning says so once."""

    @property
    def key(self) -> bytes | None:
        """32 secret bytes that digests are to be made with; None: the engine's own, as nobody else reads them."""
        ...

    @property
    def wants_more(self) -> bool:
        """Whether it can write."""
        ...

    @property
    def stats(self) -> TierStats: ...

    def holds(self, digest: bytes) -> bool:
        """Whether a block of this digest can be fetched, as far as is known."""
        ...

    def store(self, contents: Sequence[BlockContent], data: Tensor) -> None:
        """Keep copies of blocks, ``data u8 [n, block_bytes]`` on the CPU, which the tier owns from now on. It may drop
        some: a step waits for nobody."""
        ...

    def fetch(self, contents: Sequence[BlockContent], arrived: threading.Event) -> Fetch:
        """Bring blocks. What is not exactly what was asked for (digest, tokens, salt) is lost."""
        ...

    def give_back(self, piece: Piece) -> None:
        """The piece's data were copied, or nobody wants them."""
        ...

    def forget(self) -> None:
        """The model has changed: nothing that was stored may be found by this engine again."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was stored is written; False: not in that time."""
        ...

    def close(self, timeout_s: float) -> None:
        """Write what is under way, as far as time goes, and let everything go."""
        ...

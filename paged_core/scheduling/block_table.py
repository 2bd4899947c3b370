"""BlockTable: which blocks hold one row's tokens, in order. It grows, copies on write, forks and shrinks.

The table knows blocks and their pool. Its owner knows which request it belongs to, and makes sure that there are blocks
enough. Every reference to a block is held by a BlockTable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple, overload

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool


class MoveKind(Enum):
    COPY = "copy"  # within the device's cache: copy-on-write


class BlockMove(NamedTuple):
    """A block whose K/V the runner moves before the step computes."""

    source: int
    target: int
    kind: MoveKind = MoveKind.COPY


class BlockTable(Sequence[int]):
    """The ids of a request's blocks, with a reference to each of them; NULL_BLOCK where a sliding window has moved on.

    ``version`` changes whenever ids change other than by appending, so that whoever keeps a copy knows when to read it
    anew.
    """

    __slots__ = ("_ids", "version")

    def __init__(self, ids: Sequence[int] = ()) -> None:
        """The table takes over one reference to each block of ``ids``."""
        self._ids = list(ids)
        self.version = 0

    # ---- reading it --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._ids[index]

    def __repr__(self) -> str:
        return f"BlockTable({self._ids})"

    def is_shared_at(self, pool: BlockPool, position: int) -> bool:
        """Return whether a token at ``position`` goes into a partly filled block that other tables hold too."""
        block, offset = divmod(position, pool.block_size)
        return offset > 0 and pool.is_shared(self._ids[block])

    def has_slot(self, pool: BlockPool, position: int) -> bool:
        """Return whether the next token, at ``position``, fits into the last block without copying it. In nearly all
        decode steps it does."""
        block, offset = divmod(position, pool.block_size)
        return offset > 0 and not pool.is_shared(self._ids[block])

    def num_lacking(self, pool: BlockPool, position: int, num_tokens: int) -> int:
        """Return how many blocks tokens from ``position`` on take: new ones, and one for the last block if others share
        it."""
        last = (position + num_tokens - 1) // pool.block_size
        return last + 1 - len(self._ids) + self.is_shared_at(pool, position)

    # ---- changing it -------------------------------------------------------------------------------------------

    def extend(self, pool: BlockPool, position: int, num_tokens: int) -> list[BlockMove]:
        """Take blocks for tokens from ``position`` on. Returns the blocks to copy before the tokens are written."""
        moves = []
        if self.is_shared_at(pool, position):
            block = position // pool.block_size
            source, target = self._ids[block], pool.allocate()
            pool.release((source,))
            self._ids[block] = target
            self.version += 1
            moves.append(BlockMove(source, target))
        last = (position + num_tokens - 1) // pool.block_size
        while len(self._ids) <= last:
            self._ids.append(pool.allocate())
        return moves

    def append(self, block: int) -> None:
        """Append a block. The table takes over the caller's reference to it."""
        self._ids.append(block)

    def share(self, pool: BlockPool) -> list[int]:
        """Return the ids, with one more reference to each, for another table's ``replace``."""
        pool.share(self._ids)
        return list(self._ids)

    def replace(self, pool: BlockPool, ids: Sequence[int]) -> None:
        """Release all blocks and hold ``ids`` instead. The table takes over the caller's references to them."""
        pool.release(self._ids)
        self._ids = list(ids)
        self.version += 1

    def shorten(self, pool: BlockPool, num_blocks: int) -> None:
        """Release all blocks but the first ``num_blocks``."""
        if num_blocks < len(self._ids):
            pool.release(self._ids[num_blocks:])
            del self._ids[num_blocks:]
            self.version += 1

    def leave_behind(self, pool: BlockPool, num_blocks: int) -> None:
        """Release the first ``num_blocks``, which no later query can see."""
        i = min(num_blocks, len(self._ids)) - 1
        while i >= 0 and self._ids[i] != NULL_BLOCK:
            pool.release((self._ids[i],))
            self._ids[i] = NULL_BLOCK
            self.version += 1
            i -= 1

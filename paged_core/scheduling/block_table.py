"""BlockTable: which blocks hold one row's tokens, in order. It grows, copies on write, forks and shrinks.

It knows blocks and their pool; which row it is, and that there are blocks enough, is its owner's business. All that
holds references to blocks goes through here.
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
    """The ids of a row's blocks, and a reference to each of them; NULL_BLOCK where a window has moved on.

    ``version`` is another number whenever ids have changed other than by appending: who keeps a copy of the table
    reads it anew then.
    """

    __slots__ = ("_ids", "version")

    def __init__(self, ids: Sequence[int] = ()) -> None:
        """``ids``: whose references become the table's own."""
        self._ids = list(ids)
        self.version = 0

    # ---- what it holds -----------------------------------------------------------------------------------------

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
        """Whether a token at ``position`` goes into a partly filled block that others read too."""
        block, offset = divmod(position, pool.block_size)
        return offset > 0 and pool.is_shared(self._ids[block])

    def has_slot(self, pool: BlockPool, position: int) -> bool:
        """Whether a token at ``position``, the next, fits into the last block as it stands: so it does in nearly all
        steps of a decode."""
        block, offset = divmod(position, pool.block_size)
        return offset > 0 and not pool.is_shared(self._ids[block])

    def num_lacking(self, pool: BlockPool, position: int, num_tokens: int) -> int:
        """Blocks that tokens from ``position`` on take: new ones, and one for the last block if others share it."""
        last = (position + num_tokens - 1) // pool.block_size
        return last + 1 - len(self._ids) + self.is_shared_at(pool, position)

    # ---- what becomes of it ------------------------------------------------------------------------------------

    def extend(self, pool: BlockPool, position: int, num_tokens: int) -> list[BlockMove]:
        """Take blocks for tokens from ``position`` on. What comes back is to be copied before they are written."""
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
        """Hold one more, whose reference becomes the table's own."""
        self._ids.append(block)

    def share(self, pool: BlockPool) -> list[int]:
        """The ids, each with a reference more, for another table to ``replace`` its own with."""
        pool.share(self._ids)
        return list(self._ids)

    def replace(self, pool: BlockPool, ids: Sequence[int]) -> None:
        """Give back all blocks and hold others in their place, whose references become the table's own."""
        pool.release(self._ids)
        self._ids = list(ids)
        self.version += 1

    def shorten(self, pool: BlockPool, num_blocks: int) -> None:
        """Give back all blocks but the first ``num_blocks``."""
        if num_blocks < len(self._ids):
            pool.release(self._ids[num_blocks:])
            del self._ids[num_blocks:]
            self.version += 1

    def leave_behind(self, pool: BlockPool, num_blocks: int) -> None:
        """Give back the first ``num_blocks``, which no later query can see."""
        i = min(num_blocks, len(self._ids)) - 1
        while i >= 0 and self._ids[i] != NULL_BLOCK:
            pool.release((self._ids[i],))
            self._ids[i] = NULL_BLOCK
            self.version += 1
            i -= 1

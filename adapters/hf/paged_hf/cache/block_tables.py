"""BlockTables: which blocks hold the tokens of which row, for rows that advance together.

Integers only: its owner reports what happens to the rows, and copies and writes tensors as told. It does not know K/V,
heads or devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from paged_core import BlockPool, BlockTable


class BlockTables:
    """Rows of one length over a pool of their own, which grows when it is empty.

    Rows that come from one parent share its blocks. A shared block that is only partly filled is copied when one of
    its rows continues (copy-on-write).
    """

    def __init__(self, block_size: int) -> None:
        self.pool = BlockPool(0, block_size)
        self.rows: list[BlockTable] = []  # each has just the blocks that num_tokens need
        self.num_tokens = 0  # of every row
        self.version = 0  # changes whenever block ids in rows change

    def start(self, num_rows: int) -> None:
        """Empty rows, in place of those that are there."""
        self.crop(0)
        self.rows = [BlockTable() for _ in range(num_rows)]

    def extend(self, num_tokens: int) -> list[tuple[int, int]]:
        """Room for more tokens in every row. Returns the blocks to copy first, as (source, target)."""
        self._reserve(sum(row.num_lacking(self.pool, self.num_tokens, num_tokens) for row in self.rows))
        before = [len(row) for row in self.rows]
        moves = [move for row in self.rows for move in row.extend(self.pool, self.num_tokens, num_tokens)]
        self.num_tokens += num_tokens
        self.version += bool(moves) or before != [len(row) for row in self.rows]
        return [(move.source, move.target) for move in moves]

    def crop(self, num_tokens: int) -> None:
        """Forget all tokens but the first ``num_tokens`` of each row."""
        self.num_tokens = min(self.num_tokens, num_tokens)
        keep = self._num_blocks(self.num_tokens)
        for row in self.rows:
            row.shorten(self.pool, keep)
        self.version += 1

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a fork of what row ``parents[i]`` was."""
        before, self.rows = self.rows, [BlockTable(self.rows[parent].share(self.pool)) for parent in parents]
        for row in before:
            row.shorten(self.pool, 0)
        self.version += 1

    def check(self) -> None:
        """Assert that the pool and the rows agree, and that each row has the blocks its tokens need."""
        self.pool.check(self.rows)
        assert all(len(row) == self._num_blocks(self.num_tokens) for row in self.rows), "a row is too short or too long"

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _reserve(self, num_blocks: int) -> None:
        if self.pool.num_available >= num_blocks:
            return
        before = self.pool.num_blocks
        self.pool = BlockPool(max(self.pool.num_used + num_blocks, before * 3 // 2), self.pool.block_size)
        known = [self.pool.allocate() for _ in range(before)]  # low ids come first: every block keeps its id
        for row in self.rows:
            self.pool.share(row)
        self.pool.release(known)

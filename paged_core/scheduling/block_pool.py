"""BlockPool: who owns which block of the K/V cache, and which blocks can be found again by their content.

Each block is in exactly one of three states:

=======  ==================  =====================================================
state    references          findable by content
=======  ==================  =====================================================
free     0                   no
cached   0                   yes: kept for a later hit, evicted when blocks run out
used     1 or more           yes or no
=======  ==================  =====================================================

Not every block needs memory from the start: the pool grows in slabs, low ids first, and only when nothing that has
memory can be handed out. A block without memory counts as free.

The pool knows block ids and token ids. It does not know requests, nor where K/V are.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

NULL_BLOCK = 0  # pads block tables and stands for blocks that have left a sliding window; never owned

_DIGEST_BYTES = 16


class _Published(NamedTuple):
    digest: bytes
    tokens: tuple[int, ...]


class BlockPool:
    """Fixed-size blocks with reference counts and a prefix index (PagedAttention: Kwon et al., SOSP 2023).

    Args:
        num_blocks: usable blocks; their ids are 1..num_blocks.
        block_size: slots in a block.
        slab: blocks that get memory at a time, or more once the pool is large; None: all at once.
    """

    def __init__(self, num_blocks: int, block_size: int, slab: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._key = secrets.token_bytes(32)  # digests can't be forged by choosing prompts
        self._references = [0] * (num_blocks + 1)
        self.num_shared = 0  # references beyond each block's first: blocks that sharing has saved
        self._slab = slab or num_blocks
        self.num_backed = 0  # blocks 1..num_backed have memory, or will have it when the next step runs
        self._free: list[int] = []  # a stack: low ids first, so that neighbours stay near
        self._cached: OrderedDict[int, None] = OrderedDict()  # eviction order, next victim first
        self._published: dict[int, _Published] = {}
        self._index: dict[bytes, int] = {}
        self._grow()

    # ---- counts ------------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that allocate() can hand out: free ones and evictable ones."""
        return self.num_blocks - self.num_used

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_blocks - self.num_backed

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_backed - len(self._free) - len(self._cached)

    # ---- ownership ---------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """A block with one reference: a free one, else the least recently used cached one, else one of a new slab.

        Evicting comes before growing: memory follows what requests need, not what they leave behind. The caller has
        looked at ``num_available`` before.
        """
        if not self._free and not self._cached:
            self._grow()
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._index[self._published.pop(block).digest]
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block: a fork, or a prefix hit. Cached blocks become used."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._references[block] == 0:
                del self._cached[block]
            else:
                self.num_shared += 1
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of a table, last block first, so that tails are evicted before heads."""
        for block in reversed(blocks):
            if block == NULL_BLOCK:
                continue
            count = self._references[block] - 1
            assert count >= 0, f"block {block} released more often than taken"
            self._references[block] = count
            if count > 0:
                self.num_shared -= 1
            elif block in self._published:
                self._cached[block] = None
            else:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def snapshot(self) -> tuple[list[int], list[int]]:
        """(references of blocks 1..num_blocks, the cached blocks): copies."""
        return self._references[1:], list(self._cached)

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are cached, that is: would no longer be available once shared."""
        return sum(1 for block in blocks if block != NULL_BLOCK and self._references[block] == 0)

    def shrink(self) -> None:
        """Forget everything cached and all memory; the next allocate() begins with a slab again."""
        assert self.num_used == 0, "a block is in use"
        self.forget_all()
        self._free.clear()
        self.num_backed = 0

    def _grow(self) -> None:
        # Growing by a share of what is there keeps copies rare where growing means copying.
        target = min(self.num_backed + max(self._slab, self.num_backed // 2), self.num_blocks)
        self._free.extend(range(target, self.num_backed, -1))
        self.num_backed = target

    # ---- prefix index ------------------------------------------------------------------------------------------

    def extend_digests(self, digests: list[bytes], tokens: Sequence[int], salt: str | None) -> None:
        """Append the digests of the full blocks of ``tokens`` that ``digests`` lacks.

        A digest covers its block's token ids and all before them: keyed blake2b of (parent digest, token ids).
        """
        size = self.block_size
        parent = digests[-1] if digests else (salt or "").encode()
        for start in range(len(digests) * size, len(tokens) - size + 1, size):
            content = array("q", tokens[start : start + size]).tobytes()
            parent = blake2b(parent + content, digest_size=_DIGEST_BYTES, key=self._key).digest()
            digests.append(parent)

    def match(self, digests: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """The longest run of leading blocks that are in the cache. Takes no reference.

        Token ids are compared too: a digest that collides serves nobody a stranger's block.
        """
        size = self.block_size
        hits: list[int] = []
        for i, digest in enumerate(digests):
            block = self._index.get(digest)
            if block is None or self._published[block].tokens != tuple(tokens[i * size : (i + 1) * size]):
                break
            hits.append(block)
        return hits

    def publish(self, block: int, digest: bytes, tokens: Sequence[int]) -> None:
        """Make a full block findable. Its K/V must have been computed. The first block of equal content wins."""
        if digest not in self._index and block not in self._published:
            self._index[digest] = block
            self._published[block] = _Published(digest, tuple(tokens))

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks that are in use unfindable."""
        for block in blocks:
            published = self._published.pop(block, None)
            if published is not None:
                del self._index[published.digest]

    def forget_all(self) -> None:
        """Empty the prefix index: what is cached no longer belongs to the model (its weights changed)."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._published.clear()
        self._index.clear()

    # ---- invariants --------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that every block is free, cached or used: exactly one of the three.

        With the block tables of all live requests, assert also that reference counts are what the tables hold.
        """
        free, cached = set(self._free), set(self._cached)
        used = {block for block in range(1, self.num_blocks + 1) if self._references[block] > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & used or cached & used), "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.num_backed <= self.num_blocks, "a block is lost"
        assert max(free | cached | used, default=0) <= self.num_backed, "a block without memory was handed out"
        assert cached <= self._published.keys(), "a cached block can't be found"
        assert not free & self._published.keys(), "a free block can be found"
        assert {p.digest: b for b, p in self._published.items()} == self._index, "index and blocks disagree"
        if tables is not None:
            counts = [0] * (self.num_blocks + 1)
            for table in tables:
                for block in table:
                    counts[block] += block != NULL_BLOCK
            assert counts == self._references, "reference counts differ from what the tables hold"
            assert self.num_shared == sum(max(0, count - 1) for count in counts), "num_shared is off"

"""BlockPool: which requests hold which block of the K/V cache, and which blocks can be found again by their content.

Each block is in exactly one of three states:

=======  ==================  =====================================================
state    references          findable by content
=======  ==================  =====================================================
free     0                   no
cached   0                   yes: kept for a later hit, evicted when blocks run out
used     1 or more           yes or no
=======  ==================  =====================================================

Not every block needs memory from the start: the pool grows in slabs, low ids first, and only when no block with memory
is available. A block without memory counts as free.

The pool knows block ids and token ids. It does not know requests, nor where K/V are. If asked to, it records the
content of blocks that it evicts, so that a tier can keep it, and all changes of its index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paged_core.scheduling.cache_events import AllBlocksCleared, BlockRemoved, BlockStored, CacheEvent
from paged_core.scheduling.digester import Digester

NULL_BLOCK = 0  # pads block tables, and stands for blocks that have left a sliding window; no request ever holds it


class BlockContent(NamedTuple):
    """A block, and its present or future content: the K/V of ``tokens``, which follow all other tokens that ``digest``
    covers."""

    block: int
    digest: bytes  # 16 bytes
    tokens: tuple[int, ...]  # as many as the block has slots, or fewer in a preempted request's last block
    salt: str | None = None


class BlockPool:
    """Fixed-size blocks with reference counts and a prefix index (PagedAttention: Kwon et al., SOSP 2023).

    Args:
        num_blocks: usable blocks; their ids are 1..num_blocks.
        block_size: slots in a block.
        slab: blocks that get memory at a time (more, once the pool is large); None: all at once.
        key: as Digester takes it.
        tells: whether to record the content of evicted blocks for ``take_given_up``.
        vocab_size: as Digester takes it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        slab: int | None = None,
        *,
        key: bytes | None = None,
        tells: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.digester = Digester(block_size, key, vocab_size)
        self._given_up: list[BlockContent] | None = [] if tells else None
        self._references = [0] * (num_blocks + 1)
        self.num_shared = 0  # references beyond the first of each block: the blocks that sharing saves
        self._slab = slab or num_blocks
        self.num_backed = 0  # blocks 1..num_backed have memory, or will have it when the next step runs
        self._free: list[int] = []  # a stack: low ids first, so that neighbours stay near
        self._cached: OrderedDict[int, None] = OrderedDict()  # eviction order, next victim first
        self._published: dict[int, BlockContent] = {}
        self._index: dict[bytes, int] = {}
        self._events: list[CacheEvent] | None = None  # None: nobody watches the index
        self._grow()

    # ---- counts ------------------------------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """The number of blocks that allocate() can return: free ones and evictable ones."""
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
        """Return a block with one reference: a free one, else the least recently used cached one, else one of a new
        slab.

        Evicting comes before growing, so that memory grows with what requests need, not with what they have left
        behind. The caller must have checked ``num_available``.
        """
        if not self._free and not self._cached:
            self._grow()
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            content = self._published[block]
            self._unpublish(block)
            self.give_up(content)
        self._references[block] = 1
        return block

    def give_up(self, content: BlockContent) -> None:
        """Record that the next step will overwrite the content of a block."""
        if self._given_up is not None:
            self._given_up.append(content)

    def take_given_up(self) -> list[BlockContent]:
        """Return the contents recorded since the last call."""
        given_up = self._given_up
        if not given_up:
            return []
        self._given_up = []
        return given_up

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, for a fork or a prefix hit. Cached blocks become used."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._references[block] == 0:
                del self._cached[block]
            else:
                self.num_shared += 1
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a table, last block first, so that tails are evicted before heads."""
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
        """Return the references of blocks 1..num_blocks, and the cached blocks, as copies."""
        return self._references[1:], list(self._cached)

    def num_unused(self, blocks: Iterable[int]) -> int:
        """Return how many of the blocks are cached: they would no longer be available once shared."""
        return sum(1 for block in blocks if block != NULL_BLOCK and self._references[block] == 0)

    def shrink(self) -> None:
        """Forget everything cached and all memory; the next allocate() begins with a slab again."""
        assert self.num_used == 0, "a block is in use"
        self.forget_all()
        self._free.clear()
        self.num_backed = 0

    def _grow(self) -> None:
        # The pool grows by a share of its size, so that copies are rare where growing means copying.
        target = min(self.num_backed + max(self._slab, self.num_backed // 2), self.num_blocks)
        self._free.extend(range(target, self.num_backed, -1))
        self.num_backed = target

    # ---- prefix index ------------------------------------------------------------------------------------------

    def extend_digests(self, digests: list[bytes], tokens: Sequence[int], salt: str | None) -> None:
        """Append the digests of the full blocks of ``tokens`` that ``digests`` lacks."""
        self.digester.extend(digests, tokens, salt)

    def match(self, digests: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """Return the longest run of leading blocks that are in the cache. Takes no reference.

        Token ids are compared too, so that a colliding digest never returns a block of other tokens.
        """
        size = self.block_size
        hits: list[int] = []
        for i, digest in enumerate(digests):
            block = self.find(digest, tokens[i * size : (i + 1) * size])
            if block is None:
                break
            hits.append(block)
        return hits

    def find(self, digest: bytes, tokens: Sequence[int]) -> int | None:
        """Return the block in the cache that holds ``tokens`` and has this digest, or None. Takes no reference."""
        block = self._index.get(digest)
        return block if block is not None and self._published[block].tokens == tuple(tokens) else None

    def publish(
        self, block: int, digest: bytes, tokens: Sequence[int], salt: str | None = None, parent: bytes | None = None
    ) -> None:
        """Make a full block findable. Its K/V must have been computed. If several blocks have equal content, the first
        is kept.

        ``parent`` is the digest of the block before it, for those who watch the index.
        """
        if digest not in self._index and block not in self._published:
            self._index[digest] = block
            self._published[block] = content = BlockContent(block, digest, tuple(tokens), salt)
            if self._events is not None:
                self._events.append(BlockStored(digest, parent, content.tokens, salt))

    def findable(self) -> list[BlockContent]:
        """Return the contents of all findable blocks, those most worth keeping first: last used first, heads before
        tails."""
        last_used_first = [*(b for b in self._published if b not in self._cached), *reversed(self._cached)]
        return [self._published[block] for block in last_used_first]

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks that are in use unfindable."""
        for block in blocks:
            if block in self._published:
                self._unpublish(block)

    def forget_all(self) -> None:
        """Empty the prefix index. Its K/V no longer belong to the model, because the weights changed."""
        self.take_given_up()
        self._free.extend(self._cached)
        self._cached.clear()
        self._published.clear()
        self._index.clear()
        if self._events is not None:
            self._events = [AllBlocksCleared()]  # earlier changes no longer matter

    def _unpublish(self, block: int) -> None:
        digest = self._published.pop(block).digest
        del self._index[digest]
        if self._events is not None:
            self._events.append(BlockRemoved(digest))

    def watch(self) -> None:
        """Record changes of the index from now on, for ``take_events``."""
        self._events = []

    def take_events(self) -> Sequence[CacheEvent]:
        """Return the changes since the last call, in order; nothing if ``watch`` was not called."""
        events = self._events
        if not events:
            return ()
        self._events = []
        return events

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

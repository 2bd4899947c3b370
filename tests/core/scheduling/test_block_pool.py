"""BlockPool: blocks are free, cached or used; shared by reference; found again by their content."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool

BLOCK = 4


def fill(pool: BlockPool, tokens: list[int], salt: str | None = None) -> tuple[list[int], list[bytes]]:
    """Allocate and publish the full blocks of ``tokens``, as a request that computed them would."""
    digests: list[bytes] = []
    pool.extend_digests(digests, tokens, salt)
    table = [pool.allocate() for _ in digests]
    for i, block in enumerate(table):
        pool.publish(block, digests[i], tokens[i * BLOCK : (i + 1) * BLOCK])
    return table, digests


def test_every_block_can_be_allocated_once_and_never_the_null_block():
    pool = BlockPool(5, BLOCK)
    blocks = [pool.allocate() for _ in range(5)]
    assert sorted(blocks) == [1, 2, 3, 4, 5]
    assert NULL_BLOCK not in blocks
    assert pool.num_available == 0


def test_a_forked_block_stays_used_until_its_last_owner_releases_it():
    pool = BlockPool(2, BLOCK)
    table = [pool.allocate()]
    pool.share(table)
    assert pool.is_shared(table[0])
    assert pool.num_shared == 1
    pool.release(table)
    assert not pool.is_shared(table[0])
    assert pool.num_used == 1
    pool.release(table)
    assert pool.num_free == 2
    pool.check([])


def test_a_published_block_is_found_after_its_owner_has_gone():
    pool = BlockPool(8, BLOCK)
    tokens = list(range(10))
    table, digests = fill(pool, tokens)
    pool.release(table)
    assert pool.num_cached == 2
    assert pool.match(digests, tokens) == table
    pool.share(table)
    assert pool.num_cached == 0
    pool.check([table])


def test_only_the_common_prefix_matches():
    pool = BlockPool(8, BLOCK)
    table, _ = fill(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    other = [1, 2, 3, 4, 9, 9, 9, 9]
    digests: list[bytes] = []
    pool.extend_digests(digests, other, None)
    assert pool.match(digests, other) == table[:1]


def test_the_same_block_after_another_prefix_is_another_block():
    pool = BlockPool(8, BLOCK)
    fill(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    other = [5, 6, 7, 8]
    digests: list[bytes] = []
    pool.extend_digests(digests, other, None)
    assert pool.match(digests, other) == []


def test_salts_keep_tenants_apart():
    pool = BlockPool(8, BLOCK)
    tokens = [1, 2, 3, 4]
    table, _ = fill(pool, tokens, salt="alice")
    digests: list[bytes] = []
    pool.extend_digests(digests, tokens, "bob")
    assert pool.match(digests, tokens) == []
    again: list[bytes] = []
    pool.extend_digests(again, tokens, "alice")
    assert pool.match(again, tokens) == table


def test_a_digest_collision_serves_nobody_a_strangers_block():
    pool = BlockPool(8, BLOCK)
    _, digests = fill(pool, [1, 2, 3, 4])
    assert pool.match(digests, [9, 9, 9, 9]) == []


def test_digests_differ_between_pools_so_that_they_cant_be_precomputed():
    first: list[bytes] = []
    second: list[bytes] = []
    BlockPool(1, BLOCK).extend_digests(first, [1, 2, 3, 4], None)
    BlockPool(1, BLOCK).extend_digests(second, [1, 2, 3, 4], None)
    assert first != second
    assert len(first[0]) == 16


def test_the_least_recently_used_prefix_is_evicted_first_and_its_tail_before_its_head():
    pool = BlockPool(4, BLOCK)
    old, new = [1] * 8, [2] * 8
    old_table, old_digests = fill(pool, old)
    new_table, new_digests = fill(pool, new)
    pool.release(old_table)
    pool.release(new_table)
    assert pool.allocate() == old_table[1]
    assert pool.match(old_digests, old) == old_table[:1]
    assert pool.allocate() == old_table[0]
    assert pool.match(new_digests, new) == new_table
    pool.check()


def test_forgetting_all_empties_the_index_and_keeps_used_blocks():
    pool = BlockPool(4, BLOCK)
    kept, digests = fill(pool, [1, 2, 3, 4])
    gone, _ = fill(pool, [5, 6, 7, 8])
    pool.release(gone)
    pool.forget_all()
    assert pool.match(digests, [1, 2, 3, 4]) == []
    assert pool.num_used == 1
    assert pool.num_free == 3
    pool.release(kept)
    pool.check([])


def test_releasing_too_often_is_caught():
    pool = BlockPool(1, BLOCK)
    table = [pool.allocate()]
    pool.release(table)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(table)


def test_blocks_get_memory_a_slab_at_a_time_up_to_the_limit():
    pool = BlockPool(10, BLOCK, slab=4)
    assert (pool.num_backed, pool.num_free, pool.num_available) == (4, 10, 10)
    assert [pool.allocate() for _ in range(4)] == [1, 2, 3, 4]
    assert pool.num_backed == 4
    assert [pool.allocate() for _ in range(6)] == [5, 6, 7, 8, 9, 10]
    assert (pool.num_backed, pool.num_used, pool.num_available) == (10, 10, 0)
    pool.check()


def test_a_large_pool_grows_by_half_of_what_it_has():
    pool = BlockPool(100, BLOCK, slab=2)
    sizes = [pool.num_backed]
    for _ in range(60):
        pool.allocate()
        if pool.num_backed != sizes[-1]:
            sizes.append(pool.num_backed)
    assert sizes == [2, 4, 6, 9, 13, 19, 28, 42, 63]


def test_cached_blocks_are_evicted_before_the_pool_grows():
    pool = BlockPool(10, BLOCK, slab=2)
    gone, digests = fill(pool, [1] * 8)
    pool.release(gone)
    assert sorted(pool.allocate() for _ in range(2)) == [1, 2]
    assert pool.match(digests, [1] * 8) == []
    assert pool.num_backed == 2
    assert pool.allocate() == 3
    pool.check()


def test_a_shrunk_pool_has_forgotten_all_and_begins_again():
    pool = BlockPool(10, BLOCK, slab=2)
    table, digests = fill(pool, [1] * 12)
    with pytest.raises(AssertionError, match="in use"):
        pool.shrink()
    pool.release(table)
    pool.shrink()
    assert (pool.num_backed, pool.num_cached, pool.num_free, pool.num_available) == (0, 0, 10, 10)
    assert pool.match(digests, [1] * 12) == []
    pool.check([])
    assert pool.allocate() == 1
    assert pool.num_backed == 2
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Random owners of block tables: they allocate, append, fork, publish, hit, free and forget; the pool shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, BLOCK)
        self.slab = 12
        self.owners: list[tuple[list[int], list[int]]] = []  # (block table, tokens); every token has its slot
        self.most_used = 0  # since it shrank

    @initialize(slab=st.sampled_from([1, 5, 12]))
    def choose_slab(self, slab: int) -> None:
        self.slab = slab
        self.pool = BlockPool(12, BLOCK, None if slab == 12 else slab)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=14))
    def start(self, tokens: list[int]) -> None:
        digests: list[bytes] = []
        self.pool.extend_digests(digests, tokens, None)
        hits = self.pool.match(digests, tokens)
        needed = -(-len(tokens) // BLOCK) - len(hits)
        if self.pool.num_available - self.pool.num_unused(hits) < needed:
            return
        self.pool.share(hits)
        table = hits + [self.pool.allocate() for _ in range(needed)]
        self.owners.append((table, list(tokens)))

    @precondition(lambda self: self.owners)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def append(self, which: int, token: int) -> None:
        table, tokens = self.owners[which % len(self.owners)]
        if self.pool.num_available == 0:
            return
        if len(tokens) % BLOCK == 0:
            table.append(self.pool.allocate())
        elif self.pool.is_shared(table[-1]):  # copy-on-write
            copy = self.pool.allocate()
            self.pool.release(table[-1:])
            table[-1] = copy
        tokens.append(token)

    @precondition(lambda self: self.owners)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table, tokens = self.owners[which % len(self.owners)]
        self.pool.share(table)
        self.owners.append((list(table), list(tokens)))

    @precondition(lambda self: self.owners)
    @rule(which=st.integers(0, 99))
    def publish(self, which: int) -> None:
        table, tokens = self.owners[which % len(self.owners)]
        digests: list[bytes] = []
        self.pool.extend_digests(digests, tokens, None)
        for i, digest in enumerate(digests):
            self.pool.publish(table[i], digest, tokens[i * BLOCK : (i + 1) * BLOCK])

    @precondition(lambda self: self.owners)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        table, _ = self.owners.pop(which % len(self.owners))
        self.pool.release(table)

    @rule()
    def forget(self) -> None:
        self.pool.forget_all()

    @precondition(lambda self: self.pool.num_used == 0)
    @rule()
    def shrink(self) -> None:
        self.pool.shrink()
        self.most_used = 0
        assert (self.pool.num_backed, self.pool.num_free) == (0, 12)

    @invariant()
    def every_block_has_one_state(self) -> None:
        self.pool.check(table for table, _ in self.owners)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == self.pool.num_blocks
        assert self.pool.num_free + self.pool.num_cached == self.pool.num_available

    @invariant()
    def memory_follows_what_is_used(self) -> None:
        self.most_used = max(self.most_used, self.pool.num_used)
        assert self.pool.num_used <= self.pool.num_backed <= self.pool.num_blocks
        assert self.pool.num_backed <= self.most_used + max(self.slab, self.most_used // 2)

    @invariant()
    def nobody_writes_into_a_block_that_others_read(self) -> None:
        tails = [table[-1] for table, tokens in self.owners if table and len(tokens) % BLOCK]
        for block in tails:
            assert self.pool.is_shared(block) == (sum(t.count(block) for t, _ in self.owners) > 1)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40)

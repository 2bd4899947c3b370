"""Requests over a pool and a tier, as hypothesis would have them: whatever happens, a row reads its own K/V."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool
from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.request import FinishReason, Group, Request, RequestStatus, Selection
from paged_core.scheduling.schedule import Limits, Load, Schedule
from paged_core.scheduling.scheduler import Scheduler

SIZE = 4


class Shelf:
    """A tier of integers: what "K/V" are, is which tokens they are of, and under which salt and weights."""

    def __init__(self) -> None:
        self.kept: dict[bytes, list[Any]] = {}
        self.wants_more = True
        self.quick = True

    def holds(self, digest: bytes) -> bool:
        return digest in self.kept

    def pays(self, num_blocks: int, num_tokens: int) -> bool:
        assert num_blocks > 0
        assert num_tokens > 0
        return self.quick


class Machine:
    """Scheduler, "cache" and tier, stepped by hand."""

    def __init__(self, num_blocks: int, window: int | None) -> None:
        self.shelf = Shelf()
        limits = Limits(4, 12, 60, 0, 256, sliding_window=window)
        pool = BlockPool(num_blocks, SIZE, tells=True)
        self.scheduler = Scheduler(pool, Fcfs(), limits, self.shelf)
        self.window = window
        self.cache: dict[int, list[Any]] = {block: [None] * SIZE for block in range(num_blocks + 1)}
        self.coming: list[Load] = []
        self.weights = 0
        self.open: list[Request] = []
        self.ended: list[Request] = []

    def add(self, prompt: list[int], n: int, max_tokens: int, salt: str | None) -> None:
        group = Group()
        params = SamplingParams(n=n, max_tokens=max_tokens, cache_salt=salt)
        rows = [Request(str(len(self.open)), prompt, params, index=i, group=group) for i in range(n)]
        try:
            self.scheduler.add(rows)
        except InvalidRequestError:
            return
        self.open += rows

    def step(self, rnd: random.Random) -> None:
        schedule = self.scheduler.schedule()
        for content in schedule.offloads:
            self.shelf.kept[content.digest] = list(self.cache[content.block])
        self.coming += schedule.loads
        for source, target, _ in schedule.moves:
            self.cache[target] = list(self.cache[source])
        for request, start, num_tokens, _ in schedule.chunks:
            self.check_reads(request, start)
            for i in range(start, start + num_tokens):
                self.cache[request.block_table[i // SIZE]][i % SIZE] = self.truth(request, i)
        self.finish_step(schedule, rnd)

    def finish_step(self, schedule: Schedule, rnd: random.Random) -> None:
        sampled = [row for chunk in schedule.chunks for row in chunk.samples]
        outputs = self.scheduler.update(schedule, Selection([rnd.randrange(3) for _ in sampled]))
        self.take([output.request for output in outputs if output.finish_reason is not None])

    def take(self, ended: list[Request]) -> None:
        for request in ended:
            self.open.remove(request)  # which raises if it ended before
            self.ended.append(request)

    def truth(self, request: Request, i: int) -> tuple[Any, ...]:
        return (request.params.cache_salt or "", tuple(request.tokens[: i + 1]), self.weights)

    def check_reads(self, request: Request, num_tokens: int) -> None:
        first = max(0, num_tokens + 1 - self.window) if self.window is not None else 0
        for i in range(first, num_tokens):
            block = request.block_table[i // SIZE]
            assert block != NULL_BLOCK
            salt, tokens, _ = self.truth(request, i)
            assert self.cache[block][i % SIZE][:2] == (salt, tokens), f"{request} reads another's K/V at {i}"

    def land(self, load: Load, lost: set[int]) -> None:
        self.coming.remove(load)
        if load.abandoned:
            return
        for block, digest, _, _ in load.contents:
            if digest not in self.shelf.kept:
                lost = lost | {block}
            elif block not in lost:
                self.cache[block] = list(self.shelf.kept[digest])
        self.scheduler.landed(load, lost)

    def check(self) -> None:
        self.scheduler.check()
        for request in self.scheduler.running:
            if request.num_published < 1000:
                self.check_reads(request, request.num_computed)

    def drain(self, rnd: random.Random) -> None:
        for _ in range(2000):
            for load in list(self.coming):
                self.land(load, set())
            if not self.scheduler.has_work:
                break
            self.step(rnd)
            self.check()
        assert not self.open, f"never ended: {self.open}"
        assert self.scheduler.pool.num_used == 0


@settings(max_examples=60, stateful_step_count=60, deadline=None)
class PoolAndTier(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.machine: Machine | None = None

    @precondition(lambda self: self.machine is None)
    @rule(num_blocks=st.sampled_from((9, 14, 30)), window=st.sampled_from((None, None, 6, 9)))
    def begin(self, num_blocks, window):
        self.machine = Machine(num_blocks, window)

    @precondition(lambda self: self.machine is not None)
    @rule(
        family=st.integers(0, 1),
        length=st.sampled_from((3, 8, 9, 17, 24)),
        n=st.sampled_from((1, 1, 1, 3)),
        max_tokens=st.sampled_from((1, 5, 9)),
        salt=st.sampled_from((None, None, "a")),
    )
    def add(self, family, length, n, max_tokens, salt):
        if len(self.machine.open) < 9:
            self.machine.add([family + i % 7 for i in range(length)], n, max_tokens, salt)

    @precondition(lambda self: self.machine is not None)
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            self.machine.step(self.random)

    @precondition(lambda self: self.machine is not None and self.machine.coming)
    @rule(which=st.integers(0, 9), lost=st.sampled_from((0.0, 0.0, 0.5, 1.0)))
    def land(self, which, lost):
        load = self.machine.coming[which % len(self.machine.coming)]
        blocks = {content.block for content in load.contents if self.random.random() < lost}
        self.machine.land(load, blocks)

    @precondition(lambda self: self.machine is not None and self.machine.open)
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        request = self.machine.open[which % len(self.machine.open)]
        outputs = self.machine.scheduler.finish([request], FinishReason.ABORT)
        self.machine.take([output.request for output in outputs])

    @precondition(lambda self: self.machine is not None)
    @rule(wants_more=st.booleans(), quick=st.sampled_from((True, True, False)))
    def mood(self, wants_more, quick):
        self.machine.shelf.wants_more, self.machine.shelf.quick = wants_more, quick

    @precondition(lambda self: self.machine is not None)
    @rule(share=st.sampled_from((0.2, 1.0)))
    def evict(self, share):
        """What a tier held is gone, with loads of it under way."""
        kept = self.machine.shelf.kept
        for digest in [digest for digest in kept if self.random.random() < share]:
            del kept[digest]

    @precondition(lambda self: self.machine is not None and not self.machine.scheduler.running)
    @rule()
    def change_weights(self):
        self.machine.weights += 1
        self.machine.scheduler.forget_cached()
        self.machine.shelf.kept.clear()

    @invariant()
    def nothing_is_mixed_up(self):
        if self.machine is not None:
            self.machine.check()

    def teardown(self):
        if self.machine is not None:
            self.machine.drain(self.random)


TestPoolAndTier = PoolAndTier.TestCase


def steps_until(machine: Machine, done, most: int = 200) -> None:
    rnd = random.Random(1)
    for _ in range(most):
        if done():
            return
        machine.step(rnd)
    raise AssertionError("it never came to that")


def test_a_prefix_that_was_evicted_is_loaded_while_others_are_computed():
    machine = Machine(12, None)
    prompt = [1] * 17
    machine.add(prompt, 1, 1, None)
    machine.drain(random.Random(0))
    machine.add([2] * 40, 1, 5, None)
    machine.drain(random.Random(0))
    assert machine.shelf.kept, "the cache gave nothing up"
    machine.add(prompt, 1, 4, None)
    machine.add([3] * 9, 1, 3, None)
    loading, other = machine.open
    machine.step(random.Random(0))
    assert loading.status is RequestStatus.LOADING
    steps_until(machine, lambda: other.finished)
    assert loading.status is RequestStatus.LOADING
    assert loading.num_output == 0
    (load,) = machine.coming
    machine.land(load, set())
    assert loading.status is RequestStatus.RUNNING
    assert loading.num_computed == loading.num_cached == 16
    machine.drain(random.Random(0))


def test_a_load_that_is_lost_is_computed():
    machine = Machine(12, None)
    machine.add([1] * 17, 1, 1, None)
    machine.drain(random.Random(0))
    machine.add([2] * 40, 1, 5, None)
    machine.drain(random.Random(0))
    machine.add([1] * 17, 1, 4, None)
    (request,) = machine.open
    machine.step(random.Random(0))
    (load,) = machine.coming
    lost = load.contents[1].block
    place = request.block_table.index(lost)
    machine.land(load, {lost})
    assert request.num_computed == place * SIZE, "what comes after a block can't be read without it"
    machine.drain(random.Random(0))
    assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("ends", ["cancel", "weights"])
def test_what_ends_a_load_frees_its_blocks(ends):
    machine = Machine(12, None)
    machine.add([1] * 17, 1, 1, None)
    machine.drain(random.Random(0))
    machine.add([2] * 40, 1, 5, None)
    machine.drain(random.Random(0))
    machine.add([1] * 17, 1, 4, None)
    (request,) = machine.open
    machine.step(random.Random(0))
    assert machine.scheduler.pool.num_used > 0
    if ends == "cancel":
        machine.take([output.request for output in machine.scheduler.finish([request], FinishReason.ABORT)])
    else:
        machine.scheduler.forget_cached()
        machine.shelf.kept.clear()
        assert request.status is RequestStatus.WAITING
    assert machine.scheduler.pool.num_used == 0
    machine.check()
    machine.drain(random.Random(0))


def test_a_preempted_request_goes_on_from_where_it_was_if_a_tier_has_its_last_block():
    machine = Machine(8, None)
    machine.add([1] * 10, 1, 18, None)
    machine.add([2] * 10, 1, 14, None)
    first, second = machine.open
    steps_until(machine, lambda: machine.scheduler.num_preemptions == 1)
    victim = second if second.status is RequestStatus.WAITING else first
    reached = victim.num_swapped
    assert reached % SIZE, "its last block is full; choose other lengths"
    steps_until(machine, lambda: victim.status is RequestStatus.LOADING)
    (load,) = machine.coming
    machine.land(load, set())
    assert victim.num_computed == reached == len(victim.tokens) - 1
    machine.drain(random.Random(0))


def test_digests_of_ids_that_mean_something_in_this_process_only_are_this_processs():
    key = bytes(32)
    here, there = (BlockPool(4, SIZE, key=key, vocab_size=100) for _ in range(2))
    for tokens, same in (([1, 2, 3, 99, 1, 2, 3, 4], True), ([1, 2, 3, 100, 1, 2, 3, 4], False)):
        mine: list[bytes] = []
        theirs: list[bytes] = []
        here.extend_digests(mine, tokens, None)
        there.extend_digests(theirs, tokens, None)
        assert len(mine) == 2
        assert [a == b for a, b in zip(mine, theirs, strict=True)] == [same, same]

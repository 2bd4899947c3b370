"""Requests over a pool and a tier, as hypothesis would have them: whatever happens, a row reads its own K/V."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.request import FinishReason, RequestStatus
from tier_machine import SIZE, Machine


@settings(max_examples=60, stateful_step_count=60)
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

    @precondition(lambda self: self.machine is not None and self.machine.coming)
    @rule(which=st.integers(0, 9), num=st.sampled_from((1, 2)), lost=st.booleans())
    def arrive(self, which, num, lost):
        load = self.machine.coming[which % len(self.machine.coming)]
        lacking = self.machine.scheduler.lacking(load)
        contents = [content for content in load.contents if content.block in lacking][:num]
        self.machine.arrive(load, contents, {content.block for content in contents if lost})

    @precondition(lambda self: self.machine is not None and self.machine.open)
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        request = self.machine.open[which % len(self.machine.open)]
        outputs = self.machine.scheduler.finish([request], FinishReason.ABORT)
        self.machine.take([output.request for output in outputs])

    @precondition(lambda self: self.machine is not None)
    @rule(wanted=st.sampled_from(("all", "back", "none")), quick=st.sampled_from((True, True, False)),
          beside=st.booleans())  # fmt: skip
    def mood(self, wanted, quick, beside):
        self.machine.shelf.wants_more, self.machine.shelf.wants_back = wanted == "all", wanted != "none"
        self.machine.shelf.quick = quick
        self.machine.shelf.beside = beside

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


@pytest.mark.parametrize("wants_more", [True, False])
def test_a_preempted_request_goes_on_from_where_it_was_if_a_tier_has_its_last_block(wants_more):
    machine = Machine(8, None)
    machine.shelf.wants_more = wants_more  # what nobody waits for; what a preempted request had is wanted in any case
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


def test_what_nobody_waits_for_is_not_written_where_it_does_not_pay():
    machine = Machine(8, None)
    machine.shelf.wants_more = False
    for number in range(6):
        machine.add([number] * 12, 1, 3, None)
        machine.drain(random.Random(0))
    assert machine.scheduler.num_preemptions == 0
    assert machine.shelf.kept == {}
    machine.shelf.wants_back = False
    machine.add([1] * 10, 1, 18, None)
    machine.add([2] * 10, 1, 14, None)
    machine.drain(random.Random(0))
    assert machine.scheduler.num_preemptions > 0
    assert machine.shelf.kept == {}


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

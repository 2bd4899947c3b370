"""Stretches: to leap is to step, whatever the workload."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.request import Group, Request, Selection
from paged_core.scheduling.schedule import Limits
from paged_core.scheduling.scheduler import Scheduler

TOKEN = 7


class Side:
    """One of two schedulers that are asked the same."""

    def __init__(self, num_blocks: int, seats: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks, 4, key=b"k" * 32)
        self.pool.watch()
        self.scheduler = Scheduler(self.pool, Fcfs(), Limits(seats, 16, 200, 1, 8, None, caching))
        self.ended: list[str] = []

    def add(self, id: str, prompt: list[int], num_output: int, rows: int, stops: bool) -> None:
        group, params = Group(), SamplingParams(max_tokens=num_output)
        stop_tokens = frozenset([TOKEN + 1]) if stops else frozenset()
        for index in range(rows):
            Request(id, prompt, params, index=index, group=group, stop_token_ids=stop_tokens)
        self.scheduler.add(group.members)

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        num_rows = sum(len(chunk.samples) for chunk in schedule.chunks)
        outputs = self.scheduler.update(schedule, Selection([TOKEN] * num_rows))
        self.ended += [output.request.id for output in outputs if output.finish_reason is not None]

    def leap(self, most: int, part: float) -> int:
        """Returns how many steps that was."""
        stretch = self.scheduler.stretch(most)
        if stretch is None:
            return 0
        num_steps = 1 + int(part * (stretch.num_steps - 1))
        self.ended += [output.request.id for output in self.scheduler.leap(stretch, num_steps, TOKEN)]
        return num_steps

    def state(self) -> object:
        """All that later decisions hang on, the names of blocks and the order in which they are evicted included."""
        self.scheduler.check()
        rows = [
            (row.id, row.index, row.tokens, row.num_computed, row.num_published, row.digests, list(row.block_table))
            for row in (*self.scheduler.running, *self.scheduler.waiting)
        ]
        counts = self.scheduler.num_preemptions, self.scheduler.num_prefix_queries, self.scheduler.num_prefix_hits
        return rows, counts, self.ended, self.pool.snapshot(), self.pool.findable(), self.pool.take_events()


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6), num_blocks=st.integers(14, 60), seats=st.integers(2, 6), caching=st.booleans()
)  # fmt: skip
def test_to_leap_is_to_step(seed, num_blocks, seats, caching):
    rng = random.Random(seed)
    stepping, leaping = Side(num_blocks, seats, caching), Side(num_blocks, seats, caching)
    to_come = rng.randrange(2, 14)
    while to_come or stepping.scheduler.has_work:
        if to_come and rng.random() < 0.3:
            to_come -= 1
            prompt = [rng.randrange(2)] * rng.randrange(1, 20)  # many begin alike, some with what others went on with
            asked = (str(to_come), prompt + [TOKEN] * rng.randrange(6), rng.randrange(1, 24), *rng.choice(KINDS))
            stepping.add(*asked)
            leaping.add(*asked)
        num_steps = leaping.leap(rng.randrange(1, 20), rng.random())
        if not num_steps:
            leaping.step()
        for _ in range(num_steps or 1):
            stepping.step()
        assert leaping.state() == stepping.state()


KINDS = [(1, False)] * 6 + [(2, False), (1, True)]  # (samples of the prompt, whether there are tokens to stop at)


def test_a_stretch_ends_where_somebody_does_and_there_is_none_while_somebody_may_start():
    side = Side(60, 2, True)
    side.add("short", [1] * 5, 6, 1, False)
    side.add("long", [2] * 5, 30, 1, False)
    assert side.scheduler.stretch(99) is None, "prompts are to be computed"
    side.step()
    stretch = side.scheduler.stretch(99)
    assert stretch is not None and (stretch.num_steps, stretch.num_context) == (5, 12)
    side.add("waits", [3] * 5, 4, 1, False)
    assert side.leap(99, 1.0) == 5 and side.ended == ["short"], "no seat was free until then"
    assert side.scheduler.stretch(99) is None, "now there is one"


def test_a_stretch_ends_before_blocks_might_run_out():
    side = Side(14, 4, True)
    side.add("a", [1] * 8, 24, 1, False)
    side.add("b", [2] * 8, 24, 1, False)
    side.step()
    assert side.leap(99, 1.0) == 19, "ten blocks are left: five for each, of four tokens, but for who begins within one"
    assert side.scheduler.stretch(99) is None, "only one can have the last two"
    side.step()
    assert side.scheduler.num_preemptions == 0

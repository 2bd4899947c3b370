"""Who follows a pool's events knows what can be found in it."""

from __future__ import annotations

import random
from types import SimpleNamespace

from paged_core import (
    AllBlocksCleared,
    BlockPool,
    BlockRemoved,
    BlockStored,
    Engine,
    EngineConfig,
    Request,
    SamplingParams,
    Selection,
    hookimpl,
)
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.schedule import Limits
from paged_core.scheduling.scheduler import Scheduler
from tiny_model import TinyModel


class Follower:
    """A picture of a prefix index, kept by its events alone."""

    def __init__(self) -> None:
        self.stored: dict[bytes, BlockStored] = {}

    def take_in(self, events):
        for event in events:
            if isinstance(event, BlockStored):
                assert event.digest not in self.stored, "told twice"
                self.stored[event.digest] = event
            elif isinstance(event, BlockRemoved):
                del self.stored[event.digest]
            else:
                self.stored.clear()


def test_a_follower_knows_what_can_be_found_while_blocks_are_shared_evicted_and_preempted():
    rng, pool, follower = random.Random(3), BlockPool(24, 4), Follower()
    pool.watch()
    scheduler = Scheduler(pool, Fcfs(), Limits(6, 16, 64, 0, 8))
    heads = [[rng.randrange(50) for _ in range(9)] for _ in range(3)]
    num_removed = 0
    for number in range(60):
        prompt = rng.choice(heads) + [rng.randrange(50) for _ in range(rng.randrange(8))]
        params = SamplingParams(max_tokens=rng.randrange(1, 12), cache_salt=rng.choice((None, "a")))
        scheduler.add([Request(str(number), prompt, params)])
        for _ in range(rng.randrange(4)):
            schedule = scheduler.schedule()
            scheduler.update(schedule, Selection([rng.randrange(50) for c in schedule.chunks for _ in c.samples]))
            events = pool.take_events()
            num_removed += sum(isinstance(event, BlockRemoved) for event in events)
            follower.take_in(events)
            assert follower.stored.keys() == {content.digest for content in pool.findable()}
        if number == 40:
            scheduler.forget_cached()
            follower.take_in(pool.take_events())
            assert not follower.stored
    assert num_removed and scheduler.num_preemptions, "the traffic was too light to try it"


def test_a_stored_block_names_its_tokens_its_salt_and_the_block_before_it():
    pool = BlockPool(8, 4)
    pool.watch()
    scheduler = Scheduler(pool, Fcfs(), Limits(2, 64, 64, 0, 8))
    scheduler.add([Request("r", list(range(9)), SamplingParams(max_tokens=1, cache_salt="tenant"))])
    scheduler.update(scheduler.schedule(), Selection([7]))
    first, second = pool.take_events()
    assert (first.tokens, first.parent, first.salt) == ((0, 1, 2, 3), None, "tenant")
    assert (second.tokens, second.parent, second.salt) == ((4, 5, 6, 7), first.digest, "tenant")


def test_nothing_is_kept_for_nobody():
    pool = BlockPool(8, 4)
    pool.publish(1, b"d", (1, 2, 3, 4))
    assert pool.take_events() == ()


def test_an_engine_tells_its_observers_and_memory_given_back_clears_all():
    told = []
    watcher = SimpleNamespace(on_prefix_cache_changed=hookimpl(lambda events: told.extend(events)))
    engine = Engine(
        TinyModel(), EngineConfig(num_blocks=16, block_size=4, attention_backend="reference"), plugins=[watcher]
    )
    engine.add_request("r", [1, 2, 3, 4, 5], SamplingParams(max_tokens=1, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert [event.tokens for event in told] == [(1, 2, 3, 4)]
    assert engine.release_memory()
    assert isinstance(told[-1], AllBlocksCleared)

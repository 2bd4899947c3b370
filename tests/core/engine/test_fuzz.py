"""The whole engine under random traffic and faults: every row as it is alone. ``make fuzz`` goes on for hours.

A fuzzer that finds nothing may be one that can't: it has to find what is broken on purpose, too.
"""

from collections import Counter

import pytest

from fuzz.__main__ import OPERATIONS, failure, fuzz
from fuzz.alone import Alone
from paged_core.engine import engine
from paged_core.sampling import draw
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.scheduler import Scheduler

_MUST_HAVE_HAPPENED = (
    "ended: stop",
    "ended: length",
    "ended: abort",
    "ended: error",
    "preemptions",
    "prefix hits, tokens",
    "K/V compared",
    "answers of held groups",
    "faults: forward raises",
    "faults: no memory for a step",
)


def test_every_row_is_told_what_it_is_told_alone_whatever_befalls_the_others():
    """Three episodes of other models: what happens in one of them may not in another."""
    happened = Counter()
    for seed in range(3):
        counts, error = fuzz(seed, 0, lambda counts: counts["episodes"] == 1)
        assert error is None, error
        happened += counts
    for what in _MUST_HAVE_HAPPENED:
        assert happened[what] > 0, what


def without_copies(monkeypatch):
    monkeypatch.setattr(BlockPool, "is_shared", lambda self, block: False)


def without_salts(monkeypatch):
    honest = BlockPool.extend_digests
    monkeypatch.setattr(
        BlockPool, "extend_digests", lambda self, digests, tokens, salt: honest(self, digests, tokens, "")
    )


def with_a_block_lost_now_and_then(monkeypatch):
    honest = BlockPool.release
    monkeypatch.setattr(
        BlockPool, "release", lambda self, blocks: honest(self, blocks[1:] if len(blocks) > 6 else blocks)
    )


def with_draws_that_know_their_neighbours(monkeypatch):
    honest, drawn = draw.uniform, Counter()

    def uniform(request, num_unknown=0):
        drawn[""] += 1
        return honest(request, num_unknown + (drawn[""] % 50 == 0))

    monkeypatch.setattr(draw, "uniform", uniform)


def with_blocks_of_former_weights(monkeypatch):
    monkeypatch.setattr(Scheduler, "forget_cached", lambda self: None)


def with_ends_that_are_not_told(monkeypatch):
    monkeypatch.setattr(engine.OpenRequests, "tell_later", lambda self, final: None)


@pytest.mark.parametrize(
    "breaking",
    [
        without_copies,
        without_salts,
        with_a_block_lost_now_and_then,
        with_draws_that_know_their_neighbours,
        with_blocks_of_former_weights,
        with_ends_that_are_not_told,
    ],
)
def test_what_is_broken_on_purpose_is_found(breaking, monkeypatch):
    breaking(monkeypatch)
    alone = Alone()
    found = (failure(1, number, range(OPERATIONS), alone) for number in range(20))
    assert any(found)


def test_what_fails_is_made_small_and_can_be_seen_again(monkeypatch):
    with_a_block_lost_now_and_then(monkeypatch)
    _, error = fuzz(0, 0, lambda counts: False)
    told = error.splitlines()[-1]
    assert told.startswith("see it again: python -m fuzz --seed 0 --episode ")
    words = told.split()
    places = [int(place) for place in words[-1].split(",")]
    assert len(places) < 20
    number = int(words[words.index("--episode") + 1])
    assert "a block" in failure(0, number, places) or "reference counts" in failure(0, number, places)
    assert failure(0, number, places[1:]) is None

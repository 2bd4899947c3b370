"""A row that computes its first tokens while a tier brings its last: they meet, or the row does without."""

from __future__ import annotations

import random

import pytest

from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import FinishReason, Group, Request, RequestStatus
from tier_machine import SIZE, Machine

PROMPT = list(range(41))  # ten blocks, and a token


@pytest.fixture
def machine():
    """The prompt is in the tier and no longer in the cache; a row of it has computed its first chunk."""
    machine = Machine(23, None)
    machine.add(PROMPT, 1, 1, None)
    evict(machine)
    assert not machine.scheduler.pool.find(digests(machine)[0], PROMPT[:SIZE]), "the cache still has it"
    machine.shelf.beside = True
    machine.add(PROMPT, 1, 4, None)
    machine.step(random.Random(0))
    assert row(machine).status is RequestStatus.RUNNING
    assert row(machine).num_computed == 12, "a step has room for so many"
    return machine


def evict(machine):
    """All ends, and others take the blocks."""
    machine.drain(random.Random(0))
    for other in (50, 60):
        machine.add([other] * 50, 1, 3, None)
        machine.drain(random.Random(0))


def digests(machine):
    found: list[bytes] = []
    machine.scheduler.pool.extend_digests(found, PROMPT, None)
    return found


def row(machine) -> Request:
    return machine.open[0]


def arrive(machine, *places, lost=False):
    """These blocks of the prompt come from the tier."""
    (load,) = machine.coming
    contents = [content for content in load.contents if digests(machine).index(content.digest) in places]
    assert len(contents) == len(places)
    machine.arrive(load, contents, {content.block for content in contents if lost})
    machine.check()


def step(machine) -> int:
    """Returns how many tokens of the row were computed."""
    before = row(machine).num_computed
    machine.step(random.Random(0))
    machine.check()
    return row(machine).num_computed - before if machine.open else 0


def test_the_tail_comes_first_from_its_end(machine):
    (load,) = machine.coming
    assert [digests(machine).index(content.digest) for content in load.contents] == list(range(9, -1, -1))


def test_a_row_meets_its_tail_and_goes_on_behind_it(machine):
    (load,) = machine.coming
    arrive(machine, 9, 8, 7, 6)
    assert step(machine) == 8, "half of the twelve tokens in the gap, and on to the end of their block"
    arrive(machine, 5)
    assert row(machine).num_computed == 40
    assert (load.met, load.abandoned) == (True, False)
    assert not machine.coming
    assert row(machine).num_cached == machine.scheduler.num_tokens_loaded == 20
    assert row(machine).num_output == 0
    assert step(machine) == 1
    assert row(machine).num_output == 1
    machine.drain(random.Random(0))


def test_what_a_chunk_has_reached_is_skipped_though_nothing_has_come_since(machine):
    arrive(machine, *range(4, 10))
    assert step(machine) == 4 + 24
    machine.drain(random.Random(0))


def test_a_block_that_is_partly_computed_is_taken_when_it_comes(machine):
    machine.scheduler._budget = 2
    assert step(machine) == 2
    arrive(machine, *range(9, 3, -1))
    arrive(machine, 3)
    assert row(machine).num_computed == 40
    machine.drain(random.Random(0))


def test_what_is_computed_already_is_not_written_to(machine):
    (load,) = machine.coming
    computed = set(row(machine).block_table[:3])
    assert not computed & machine.scheduler.lacking(load)
    arrive(machine, 2, 1, 0)
    assert row(machine).num_computed == 12


def test_a_gap_in_what_has_come_is_computed(machine):
    arrive(machine, 9, 8, 7, 5, 4, 3)
    assert row(machine).num_computed == 24
    arrive(machine, 6, lost=True)
    (load,) = machine.coming
    machine.land(load, {content.block for content in load.contents})
    assert step(machine) == SIZE + 12, "one block is computed, and what has come behind it is skipped"
    assert load.met
    machine.drain(random.Random(0))


def test_what_never_comes_is_computed_in_whole_chunks(machine):
    (load,) = machine.coming
    machine.coming.remove(load)
    machine.scheduler.landed(load, {content.block for content in load.contents})
    assert [step(machine) for _ in range(3)] == [12, 12, 5]
    assert machine.scheduler.num_tokens_loaded == 0
    machine.drain(random.Random(0))


def test_while_nothing_comes_the_row_goes_on_all_the_same(machine):
    sizes = []
    while row(machine).num_output == 0:
        sizes.append(step(machine))
    assert sum(sizes) == 29
    assert sizes == sorted(sizes[:-1], reverse=True) + sizes[-1:], "ever less, as the tier is said to be near"
    assert not machine.scheduler.loads
    machine.drain(random.Random(0))


@pytest.mark.parametrize("way", ["cancel", "weights"])
def test_what_ends_it_gives_back_the_blocks_ahead_and_the_load(machine, way):
    (load,) = machine.coming
    arrive(machine, 9, 8)
    scheduler = machine.scheduler
    if way == "cancel":
        machine.take([output.request for output in scheduler.finish([row(machine)], FinishReason.ABORT)])
        assert scheduler.pool.num_used == 0
    else:
        machine.weights += 1
        scheduler.forget_cached()
        machine.shelf.kept.clear()
        assert len(row(machine).block_table) == 3
    assert (load.met, load.abandoned) == (False, True)
    assert not scheduler.lacking(load)
    machine.check()


def test_a_row_that_must_give_way_leaves_its_tail_and_begins_again(machine):
    evict(machine)
    machine.add([70] * 47, 1, 9, None)  # twelve blocks, and soon one more
    for _ in range(4):
        machine.step(random.Random(0))
    machine.add(PROMPT, 1, 4, None)
    older, newer = machine.open
    machine.step(random.Random(0))
    (load,) = machine.coming
    spare = machine.scheduler.pool.allocate()
    for _ in range(2):
        machine.step(random.Random(0))
    assert (newer.status, load.abandoned) == (RequestStatus.WAITING, True)
    machine.scheduler.pool.release([spare])
    machine.check()
    machine.drain(random.Random(0))
    assert older.finish_reason is newer.finish_reason is FinishReason.LENGTH


def test_samples_of_one_prompt_fork_when_it_is_whole(machine):
    evict(machine)
    machine.add(PROMPT, 3, 4, None)
    step(machine)
    assert [request.status for request in machine.open][1:] == [RequestStatus.PENDING_FORK] * 2
    arrive(machine, *range(9, 2, -1))
    step(machine)
    assert [request.num_output for request in machine.open] == [1, 1, 1]
    machine.drain(random.Random(0))


def waits_instead(machine, add) -> bool:
    evict(machine)
    add()
    machine.step(random.Random(0))
    return row(machine).status is RequestStatus.LOADING


def test_where_others_have_prompts_to_compute_it_only_loads(machine):
    def two():
        machine.add(PROMPT, 1, 4, None)
        machine.add([80] * 9, 1, 4, None)

    assert waits_instead(machine, two)
    machine.drain(random.Random(0))


def test_rows_of_a_lockstep_group_wait_for_all_of_theirs(machine):
    def group():
        rows = Group(lockstep=True)
        machine.open += [Request("g", PROMPT, SamplingParams(max_tokens=3), group=rows)]
        machine.scheduler.add(rows.members)

    assert waits_instead(machine, group)
    machine.drain(random.Random(0))

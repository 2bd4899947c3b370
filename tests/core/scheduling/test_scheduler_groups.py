"""The Scheduler forks samples from one prompt, and keeps lockstep groups together."""

import pytest

from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import FinishReason, Group, Request
from schedulers import add, add_rows, make, run_to_end, step, work_of


def test_samples_of_one_prompt_share_its_blocks_and_copy_on_write():
    scheduler = make()
    rows = add(scheduler, "a", 6, max_tokens=4, rows=3)
    schedule, outputs = step(scheduler)
    assert work_of(schedule) == {"a": 6}
    assert [output.request.index for output in outputs] == [0, 1, 2]
    assert [*rows[0].block_table] == [*rows[1].block_table] == [*rows[2].block_table]
    schedule, _ = step(scheduler)
    assert len(schedule.moves) == 2, "two of three must copy the half-filled block; the last may write in place"
    assert len({row.block_table[1] for row in rows}) == 3
    assert len({row.block_table[0] for row in rows}) == 1
    run_to_end(scheduler)


def test_once_whoever_shared_its_last_block_is_preempted_a_row_needs_no_copy_and_nobody_else_is():
    scheduler = make(num_blocks=2)
    first, second, third = add(scheduler, "a", 6, max_tokens=2, rows=3)
    step(scheduler)
    schedule, _ = step(scheduler)
    assert schedule.preempted == [third, second]
    assert [chunk.request for chunk in schedule.chunks] == [first]
    assert not schedule.moves
    run_to_end(scheduler)
    assert scheduler.num_preemptions == 2


def test_cancelling_samples_before_their_fork_frees_everything():
    scheduler = make(budget=8)
    rows = add(scheduler, "a", 20, rows=4)
    step(scheduler)
    outputs = scheduler.finish(rows, FinishReason.ABORT)
    assert len(outputs) == 4
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0
    scheduler.check()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1])
@pytest.mark.parametrize("lockstep", [False, True])
def test_a_sample_that_ends_before_the_fork_leaves_the_prompt_to_its_siblings(which, num_steps, lockstep):
    scheduler = make(budget=8)
    rows = add(scheduler, "a", 20, max_tokens=3, rows=3, lockstep=lockstep)
    for _ in range(num_steps):
        step(scheduler)
    assert [output.request for output in scheduler.finish([rows[which]], FinishReason.STOP)] == [rows[which]]
    scheduler.check()
    num_computed = 8 * num_steps
    while scheduler.has_work:
        schedule, outputs = step(scheduler)
        num_computed += sum(chunk.num_tokens for chunk in schedule.chunks)
        assert rows[which] not in [output.request for output in outputs]
    others = [row for row in rows if row is not rows[which]]
    assert [row.finish_reason for row in others] == [FinishReason.LENGTH] * 2
    assert num_computed == 20 + 2 * 2, "what was computed of the prompt is not computed again"
    assert scheduler.pool.num_used == 0


def test_a_row_that_ends_before_the_fork_leaves_its_place_in_the_lockstep():
    scheduler = make(budget=8)
    group = Group(lockstep=True)
    for index, first in enumerate((5, 6, 5, 5)):
        Request("a", [first] * 9, SamplingParams(max_tokens=3), index=index, group=group)
    rows = group.members
    scheduler.add(rows)
    step(scheduler)
    scheduler.finish(rows[:1], FinishReason.STOP)
    told = []
    while scheduler.has_work:
        told += [[output.request.index for output in outputs] for _, outputs in [step(scheduler)] if outputs]
    assert [sorted(indices) for indices in told] == [[1, 2, 3]] * 3


def test_rows_of_a_lockstep_group_sample_together_or_not_at_all():
    scheduler = make(budget=8, num_blocks=64)
    rows = add_rows(scheduler, "g", [3, 17, 9])
    add(scheduler, "other", 4, max_tokens=30)
    for _ in range(30):
        schedule, _ = step(scheduler)
        sampled = [row for chunk in schedule.chunks for row in chunk.samples if row.id == "g"]
        assert sampled in ([], rows)
        if rows[0].finished:
            break
    assert [row.num_output for row in rows] == [6, 6, 6]


def test_a_lockstep_group_is_preempted_whole():
    scheduler = make(num_blocks=12, caching=False)
    add(scheduler, "old", 8, max_tokens=24)
    step(scheduler)
    rows = add_rows(scheduler, "g", [6, 6], max_tokens=12)
    preempted_whole = False
    while scheduler.has_work:
        schedule, _ = step(scheduler)
        gone = [row for row in schedule.preempted if row.id == "g"]
        assert gone in ([], rows)
        preempted_whole |= bool(gone)
    assert preempted_whole
    assert [row.num_output for row in rows] == [12, 12]


def test_a_lockstep_group_without_max_tokens_ends_when_its_rows_fill_the_cache():
    scheduler = make(num_blocks=8)
    group = Group(lockstep=True)
    for index in range(2):
        Request("g", [index, 1], SamplingParams(max_tokens=None), index=index, group=group)
    scheduler.add(group.members)
    run_to_end(scheduler)
    assert [len(row.tokens) for row in group.members] == [16, 16]


def test_an_error_in_one_row_of_a_lockstep_group_ends_the_group():
    scheduler = make()
    add_rows(scheduler, "g", [3, 3])
    _, outputs = step(scheduler, errors={1: "broken"})
    assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.ERROR] * 2
    assert not scheduler.has_work


def test_beams_continue_from_their_parents_and_share_their_blocks():
    scheduler = make()
    rows = add_rows(scheduler, "g", [5, 5, 5], max_tokens=9)
    step(scheduler)
    histories = [list(row.tokens) for row in rows]
    _, _ = step(scheduler, parents=[1, 1, 0])
    assert rows[0].tokens == [*histories[1], 1000]
    assert rows[1].tokens == [*histories[1], 1001]
    assert rows[2].tokens == [*histories[0], 1002]
    assert [*rows[0].block_table] == [*rows[1].block_table]
    schedule, _ = step(scheduler)
    assert len(schedule.moves) == 1, "of two beams in one block one copies"
    run_to_end(scheduler)

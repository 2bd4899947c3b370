"""The Scheduler shares blocks of one beginning, and gives blocks back that no layer looks at."""

from paged_core.scheduling.block_pool import NULL_BLOCK
from paged_core.scheduling.request import FinishReason, Selection
from schedulers import add, make, run_to_end, step, work_of


def test_a_prefix_that_was_computed_is_not_computed_again():
    scheduler = make()
    prompt = list(range(13))
    add(scheduler, "a", prompt, max_tokens=1)
    run_to_end(scheduler)
    again = add(scheduler, "b", prompt, max_tokens=1)
    schedule, _ = step(scheduler)
    assert work_of(schedule) == {"b": 1}
    assert again.num_cached == 12


def test_the_last_token_is_always_computed_even_if_every_block_is_cached():
    scheduler = make()
    prompt = list(range(8))
    add(scheduler, "a", prompt, max_tokens=1)
    run_to_end(scheduler)
    add(scheduler, "b", prompt, max_tokens=1)
    schedule, _ = step(scheduler)
    assert work_of(schedule) == {"b": 4}


def test_a_block_is_not_shared_before_the_step_that_computes_it_has_ended():
    scheduler = make()
    prompt = list(range(9))
    a, b = add(scheduler, "a", prompt), add(scheduler, "b", prompt)
    schedule = scheduler.schedule()
    assert not set(a.block_table) & set(b.block_table)
    scheduler.update(schedule, Selection([1] * len(schedule.chunks)))
    scheduler.schedule()
    assert b.block_table[:2] == a.block_table[:2]


def test_requests_that_share_a_prefix_wait_for_the_one_that_computes_it():
    scheduler = make(budget=100, seqs=8)
    prefix = list(range(40))
    for i in range(5):
        add(scheduler, str(i), [*prefix, 100 + i], max_tokens=3)
    assert work_of(step(scheduler)[0]) == {"0": 41}
    assert work_of(step(scheduler)[0]) == {"0": 1, "1": 1, "2": 1, "3": 1, "4": 1}
    run_to_end(scheduler)


def test_those_who_wait_for_a_prefix_go_on_when_its_owner_is_cancelled():
    scheduler = make(budget=16)
    prefix = list(range(40))
    owner = add(scheduler, "0", prefix)
    add(scheduler, "1", [*prefix, 7])
    step(scheduler)
    scheduler.finish([owner], FinishReason.ABORT)
    assert [o.request.id for o in run_to_end(scheduler)] == ["1"]


def test_prompt_logprobs_read_no_prefix_and_bound_the_rows_of_a_step():
    scheduler = make(budget=100)
    prompt = list(range(20))
    add(scheduler, "a", prompt, max_tokens=1)
    run_to_end(scheduler)
    add(scheduler, "b", prompt, max_tokens=1, prompt_logprobs=0)
    assert [work_of(step(scheduler)[0]) for _ in range(3)] == [{"b": 8}, {"b": 8}, {"b": 4}]


def test_blocks_behind_a_sliding_window_are_given_back():
    scheduler = make(num_blocks=12, window=6, budget=8, max_len=10_000)
    request = add(scheduler, "a", 40, max_tokens=300)
    while scheduler.has_work:
        step(scheduler)
        live = [block for block in request.block_table if block != NULL_BLOCK]
        assert len(live) <= 5
    assert request.num_output == 300


def test_a_prefix_hit_behind_the_window_takes_no_blocks():
    scheduler = make(num_blocks=14, window=8, budget=16, max_len=10_000)
    first = list(range(40))
    add(scheduler, "a", first, max_tokens=2)
    run_to_end(scheduler)
    again = add(scheduler, "b", first + list(range(100, 140)), max_tokens=2)
    run_to_end(scheduler, max_steps=20)
    assert scheduler.num_preemptions == 0
    assert again.num_output == 2

"""The Scheduler: requests join and leave, chunks, admission, preemption, and how requests end."""

import random

import pytest

from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.policies import Priority
from paged_core.scheduling.request import FinishReason, Request
from schedulers import add, make, run_to_end, step, work_of


def test_requests_join_and_leave_at_every_step():
    scheduler = make()
    add(scheduler, "a", 3, max_tokens=2)
    first, _ = step(scheduler)
    add(scheduler, "b", 5, max_tokens=2)
    second, outputs = step(scheduler)
    assert work_of(first) == {"a": 3}
    assert work_of(second) == {"a": 1, "b": 5}
    assert [(o.request.id, o.finish_reason) for o in outputs] == [("a", FinishReason.LENGTH), ("b", None)]
    assert [request.id for request in scheduler.running] == ["b"]


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes():
    scheduler = make(budget=8)
    add(scheduler, "short", 2, max_tokens=50)
    step(scheduler)
    add(scheduler, "long", 30, max_tokens=5)
    shares = [work_of(step(scheduler)[0]) for _ in range(5)]
    assert shares == [{"short": 1, "long": 7}] * 4 + [{"short": 1, "long": 2}]


def test_a_chunk_samples_only_when_the_prompt_is_complete():
    scheduler = make(budget=8)
    add(scheduler, "a", 20)
    samples = [[len(chunk.samples) for chunk in step(scheduler)[0].chunks] for _ in range(3)]
    assert samples == [[0], [0], [1]]


def test_every_running_request_gets_a_token_even_behind_a_long_prompt():
    scheduler = make(budget=8, seqs=8)
    add(scheduler, "long", 100, max_tokens=3)
    step(scheduler)
    for i in range(3):
        add(scheduler, f"s{i}", 1, max_tokens=20)
    for _ in range(20):
        schedule, _ = step(scheduler)
        assert all(request.id in work_of(schedule) for request in scheduler.running)
        assert sum(work_of(schedule).values()) <= 8


def test_blocks_are_taken_when_tokens_need_them_and_not_before():
    scheduler = make()
    request = add(scheduler, "a", 6, max_tokens=10)
    step(scheduler)
    assert len(request.block_table) == 2
    step(scheduler)
    step(scheduler)
    assert len(request.block_table) == 2
    step(scheduler)
    assert len(request.block_table) == 3


def test_all_blocks_come_back_when_everything_has_ended():
    scheduler = make(num_blocks=20)
    for i in range(10):
        add(scheduler, str(i), 1 + i, max_tokens=1 + i, rows=1 + i % 3)
    run_to_end(scheduler)
    assert scheduler.pool.num_used == 0
    assert scheduler.pool.num_available == 20


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = make(num_blocks=4)
    with pytest.raises(InvalidRequestError, match="may need 5 K/V blocks but the cache has 4"):
        add(scheduler, "big", 15, max_tokens=5)
    with pytest.raises(InvalidRequestError, match=r"200 tokens.*max_model_len \(200\)"):
        add(make(), "long", 200)
    with pytest.raises(InvalidRequestError, match=r"9 sequences.*max_num_seqs is 8"):
        add(scheduler, "wide", 3, rows=9)
    assert not scheduler.has_work
    add(scheduler, "fits", 15, max_tokens=1)
    assert [o.finish_reason for o in run_to_end(scheduler)] == [FinishReason.LENGTH]


def test_without_max_tokens_a_request_takes_what_the_cache_has_and_ends_there():
    scheduler = make(num_blocks=4)
    request = add(scheduler, "a", 3, max_tokens=None)
    run_to_end(scheduler)
    assert request.finish_reason is FinishReason.LENGTH
    assert len(request.tokens) == 16


def test_when_blocks_run_out_the_newest_is_preempted_and_ends_all_the_same():
    scheduler = make(num_blocks=6, caching=False)
    old, new = add(scheduler, "old", 7, max_tokens=16), add(scheduler, "new", 7, max_tokens=16)
    order = [output.request for output in run_to_end(scheduler)]
    assert scheduler.num_preemptions > 0
    assert order == [old, new]
    assert [request.num_output for request in order] == [16, 16]


@pytest.mark.parametrize("seed", [79, 89, 130, 154, 280])
def test_a_preempted_request_makes_progress_before_it_is_preempted_again(seed):
    # Seeds whose arrivals bring about what is rare: blocks run out while a preempted request computes its tokens again.
    draw = random.Random(seed)
    num_blocks, seqs = draw.randrange(12, 40), draw.randrange(3, 7)
    scheduler = make(num_blocks, caching=False, budget=seqs + draw.randrange(0, 3), seqs=seqs)
    to_come = [(draw.randrange(1, 20), draw.randrange(5, 28)) for _ in range(8)]
    length_at_preemption = {}
    count = 0
    while scheduler.has_work or to_come:
        while to_come and draw.random() < 0.4:
            prompt, num_tokens = to_come.pop()
            add(scheduler, str(count), prompt, max_tokens=num_tokens)
            count += 1
        if not scheduler.has_work:
            continue
        schedule, _ = step(scheduler)
        for request in schedule.preempted:
            assert len(request.tokens) > length_at_preemption.get(request, 0)
            length_at_preemption[request] = len(request.tokens)
    assert length_at_preemption


def test_admission_keeps_the_watermark_free_for_those_who_run():
    scheduler = make(num_blocks=10, watermark=3)
    add(scheduler, "a", 16, max_tokens=4)
    add(scheduler, "b", 16, max_tokens=4)
    step(scheduler)
    assert [request.id for request in scheduler.running] == ["a"]
    run_to_end(scheduler)


def test_admission_counts_the_blocks_that_unfinished_prompts_will_still_take():
    scheduler = make(num_blocks=10, budget=8, caching=False)
    add(scheduler, "a", 28, max_tokens=4)
    add(scheduler, "b", 28, max_tokens=4)
    for _ in range(3):
        step(scheduler)
        assert [request.id for request in scheduler.running] == ["a"]
    run_to_end(scheduler)
    assert scheduler.num_preemptions == 0


def test_under_the_priority_policy_lower_numbers_run_first_and_are_preempted_last():
    scheduler = make(num_blocks=7, policy=Priority(), caching=False)
    add(scheduler, "low", 8, max_tokens=12, priority=5)
    step(scheduler)
    add(scheduler, "high", 8, max_tokens=12, priority=-1)
    finished = [output.request.id for output in run_to_end(scheduler)]
    assert scheduler.num_preemptions > 0
    assert finished == ["high", "low"]


def test_equal_priorities_are_first_come_first_served():
    scheduler = make(seqs=1, policy=Priority())
    for id in "abc":
        add(scheduler, id, 3, max_tokens=1)
    assert [output.request.id for output in run_to_end(scheduler)] == ["a", "b", "c"]


def test_what_cant_be_queued_leaves_nothing_behind():
    class Picky:
        def key(self, request):
            return {"good": 0}[request.id]

    scheduler = make(policy=Picky())
    with pytest.raises(KeyError):
        add(scheduler, "bad", 9, rows=2)
    with pytest.raises(OverflowError):
        add(scheduler, "good", [2**70] * 9, rows=2)  # its blocks have no digest
    assert not scheduler.has_work
    scheduler.check()
    good = add(scheduler, "good", 9)
    assert [output.request for output in run_to_end(scheduler)] == [good]


def test_cancelling_twice_answers_once():
    scheduler = make()
    request = add(scheduler, "a", 5)
    assert len(scheduler.finish([request], FinishReason.ABORT)) == 1
    assert scheduler.finish([request], FinishReason.ABORT) == []


def test_a_row_that_fails_ends_alone():
    scheduler = make()
    bad, good = add(scheduler, "bad", 3), add(scheduler, "good", 3)
    _, outputs = step(scheduler, errors={0: "broken"})
    assert [(o.request, o.finish_reason, o.error) for o in outputs] == [
        (bad, FinishReason.ERROR, "broken"),
        (good, None, None),
    ]
    assert scheduler.running == [good]


def test_stop_tokens_end_a_request_with_stop():
    scheduler = make()
    request = Request("a", [1, 2], SamplingParams(max_tokens=9), stop_token_ids=frozenset({1000}))
    scheduler.add([request])
    _, outputs = step(scheduler)
    assert outputs[0].finish_reason is FinishReason.STOP
    assert outputs[0].token_ids == (1000,)


def test_a_policy_is_any_object_with_a_key():
    class ShortestPromptFirst:
        def key(self, request):
            return request.num_prompt

    scheduler = make(seqs=1, policy=ShortestPromptFirst())
    for id, length in (("long", 9), ("short", 2), ("middle", 5)):
        add(scheduler, id, length, max_tokens=1)
    assert [output.request.id for output in run_to_end(scheduler)] == ["short", "middle", "long"]

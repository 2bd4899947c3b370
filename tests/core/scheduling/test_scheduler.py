"""Scheduler: who is computed when, on integers alone."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool
from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.policies import Fcfs, Priority
from paged_core.scheduling.request import FinishReason, Group, Request, Selection
from paged_core.scheduling.schedule import Limits, Schedule
from paged_core.scheduling.scheduler import Scheduler

BLOCK = 4


def make(num_blocks=64, *, seqs=8, budget=32, max_len=200, watermark=0, window=None, policy=None, caching=True):
    limits = Limits(seqs, budget, max_len, watermark, 8, window, caching)
    return Scheduler(BlockPool(num_blocks, BLOCK), policy or Fcfs(), limits)


def add(scheduler, id, prompt, *, max_tokens=5, lockstep=False, rows=1, **params):
    """Queue ``rows`` samples of a prompt (token ids, or a length)."""
    if isinstance(prompt, int):
        prompt = [hash((id, i)) % 1000 for i in range(prompt)]
    group = Group(lockstep)
    p = SamplingParams(max_tokens=max_tokens, **params)
    for index in range(rows):
        Request(id, prompt, p, index=index, group=group)
    scheduler.add(group.members)
    return group.members[0] if rows == 1 else group.members


def step(scheduler, **selection):
    """One step in which row i samples token 1000 + i."""
    schedule = scheduler.schedule()
    num_rows = sum(len(chunk.samples) for chunk in schedule.chunks)
    outputs = scheduler.update(schedule, Selection([1000 + i for i in range(num_rows)], **selection))
    scheduler.check()
    return schedule, outputs


def work_of(schedule: Schedule) -> dict[str, int]:
    work: dict[str, int] = {}
    for chunk in schedule.chunks:
        work[chunk.request.id] = work.get(chunk.request.id, 0) + chunk.num_tokens
    return work


def run_to_end(scheduler, max_steps=2000):
    final = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            return final
        schedule, outputs = step(scheduler)
        assert schedule.chunks, "a step with work to do computed nothing"
        final += [output for output in outputs if output.finish_reason is not None]
    raise AssertionError("requests never ended")


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


def add_rows(scheduler, id, lengths, max_tokens=6):
    group = Group(lockstep=True)
    for index, length in enumerate(lengths):
        prompt = [index * 100 + i for i in range(length)]
        Request(id, prompt, SamplingParams(max_tokens=max_tokens), index=index, group=group)
    scheduler.add(group.members)
    return group.members


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


def test_a_policy_is_any_object_with_a_key():
    class ShortestPromptFirst:
        def key(self, request):
            return request.num_prompt

    scheduler = make(seqs=1, policy=ShortestPromptFirst())
    for id, length in (("long", 9), ("short", 2), ("middle", 5)):
        add(scheduler, id, length, max_tokens=1)
    assert [output.request.id for output in run_to_end(scheduler)] == ["short", "middle", "long"]


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations, failures and steps on a small cache; every invariant after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.live: dict[Request, None] = {}
        self.ended: dict[Request, FinishReason] = {}
        self.held_by_their_caller: set[Group] = set()
        self.scheduler = make(num_blocks=14, seqs=5, budget=9, max_len=40, watermark=1)

    @rule(length=st.integers(1, 20), rows=st.integers(1, 3), tokens=st.integers(1, 15), common=st.booleans())
    def arrive(self, length: int, rows: int, tokens: int, common: bool) -> None:
        prompt = list(range(length)) if common else [self.count * 50 + i for i in range(length)]
        self._add(Group(), [prompt] * rows, tokens)

    @rule(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=3), tokens=st.integers(1, 6), held=st.booleans())
    def arrive_in_lockstep(self, lengths: list[int], tokens: int, held: bool) -> None:
        group = Group(lockstep=True)
        self._add(group, [[self.count * 50 + i for i in range(n)] for n in lengths], tokens)
        if held:
            self.held_by_their_caller.add(group)

    def _add(self, group: Group, prompts: list[list[int]], tokens: int) -> None:
        self.count += 1
        params = SamplingParams(max_tokens=tokens)
        for index, prompt in enumerate(prompts):
            Request(str(self.count), prompt, params, index=index, group=group)
        try:
            self.scheduler.add(group.members)
        except InvalidRequestError:
            return
        self.live.update(dict.fromkeys(group.members))

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        if self.live:
            victim = list(self.live)[which % len(self.live)]
            self._note(self.scheduler.finish(victim.group.members, FinishReason.ABORT))

    @rule(which=st.integers(0, 99))
    def end_one_row(self, which: int) -> None:
        if self.live:
            victim = list(self.live)[which % len(self.live)]
            self._note(self.scheduler.finish([victim], FinishReason.STOP))

    @rule(failing=st.integers(0, 40), data=st.data())
    def step(self, failing: int, data: st.DataObject) -> None:
        schedule = self.scheduler.schedule()
        if not any(request.held for request in self.live):  # else all blocks may be with those that are held
            assert bool(schedule.chunks) == self.scheduler.has_work
        assert not any(chunk.request.held for chunk in schedule.chunks)
        assert sum(chunk.num_tokens for chunk in schedule.chunks) <= 9
        rows = [row for chunk in schedule.chunks for row in chunk.samples]
        errors = {failing: "broken"} if failing < len(rows) else None
        parents = list(range(len(rows)))
        for i, row in enumerate(rows):
            same = [
                j for j, other in enumerate(rows) if other.group is row.group and len(other.tokens) == len(row.tokens)
            ]
            if row.group.lockstep and row.num_prompt == row.group.members[0].num_prompt:
                parents[i] = data.draw(st.sampled_from(same))
        tokens = [None if row.group in self.held_by_their_caller else i for i, row in enumerate(rows)]
        self._note(self.scheduler.update(schedule, Selection(tokens, None, errors, parents)))

    @rule(which=st.integers(0, 99), drop=st.booleans(), data=st.data())
    def answer(self, which: int, drop: bool, data: st.DataObject) -> None:
        """The caller of a held group brings its tokens, with parents as a beam search would, or ends a row."""
        groups = list(dict.fromkeys(request.group for request in self.live if request.held))
        if not groups:
            return
        rows = [row for row in groups[which % len(groups)].members if not row.finished]
        assert all(row.held for row in rows), "a lockstep group is held whole or not at all"
        full = len(rows[0].tokens) + 1 >= rows[0].max_total
        if drop or full:
            self._note(self.scheduler.finish(rows if full else rows[:1], FinishReason.STOP))
            return
        alike = len({len(row.tokens) for row in rows}) == 1
        parents = [data.draw(st.sampled_from(range(len(rows)))) for _ in rows] if alike else None
        self.scheduler.resume(rows, list(range(len(rows))), parents)

    def _note(self, outputs) -> None:
        for output in outputs:
            assert output.request not in self.ended, "news of a request that has ended"
            if output.finish_reason is not None:
                self.ended[output.request] = output.finish_reason
                self.live.pop(output.request)

    @invariant()
    def everything_adds_up(self) -> None:
        self.scheduler.check()
        assert all(not request.finished for request in self.live)

    def teardown(self) -> None:
        for _ in range(3000):
            held = [request for request in self.live if request.held]
            if held:
                self._note(self.scheduler.finish(held, FinishReason.ABORT))
            if not self.scheduler.has_work:
                break
            self._note(step(self.scheduler)[1])
        assert not self.live, "somebody never ended"
        assert self.scheduler.pool.num_available == 14


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

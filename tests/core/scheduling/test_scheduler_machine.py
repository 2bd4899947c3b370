"""The Scheduler under requests of all kinds in any order: its own integers stay consistent."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.request import FinishReason, Group, Request, Selection
from schedulers import make, step


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
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40)

"""Scheduler: decides which tokens of which requests the next step computes, and takes in the step's results.

There is no prefill phase and no decode phase. Each running request lacks some tokens (``len(tokens) - num_computed``:
one while it decodes, many while its prompt is new) and is given as many as the step's token budget allows. Requests
join and leave at every step. The cost of a step grows with the number of running requests, not with their lengths.

Only the Scheduler and its parts (Roster, Prefixes, Admission, ScheduleBuilder, Departures, BlockTable) change requests
and, through the BlockPool, who holds which block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from paged_core.scheduling import forks, results, stretches
from paged_core.scheduling.admission import Admission
from paged_core.scheduling.block_pool import BlockContent, BlockPool
from paged_core.scheduling.capacity import set_max_total
from paged_core.scheduling.departures import Departures
from paged_core.scheduling.loading import Loading
from paged_core.scheduling.policies import SchedulingPolicy
from paged_core.scheduling.prefixes import Prefixes, Stored
from paged_core.scheduling.request import FinishReason, Request, RequestOutput, RequestStatus, Selection
from paged_core.scheduling.roster import Roster, by_prompt
from paged_core.scheduling.schedule import Limits, Load, Schedule
from paged_core.scheduling.schedule_builder import ScheduleBuilder
from paged_core.scheduling.stretches import Stretch
from paged_core.scheduling.tails import Tails


class Scheduler:
    """Continuous batching (Orca: Yu et al., OSDI 2022) with chunked prefill over paged blocks.

    Args:
        stored: what a tier holds; None: there is no tier.
    """

    def __init__(self, pool: BlockPool, policy: SchedulingPolicy, limits: Limits, stored: Stored | None = None) -> None:
        self.pool = pool
        self.policy = policy
        self.limits = limits
        self._stored = stored
        self._roster = Roster(policy)
        self._prefixes = Prefixes(pool, limits, stored)
        self._loading = Loading(self._roster, self._prefixes, pool)
        self._tails = Tails(self._roster, self._prefixes, pool, stored)
        self._admission = Admission(self._roster, self._prefixes, self._loading, self._tails, pool, limits)
        self._departures = Departures(self._roster, self._prefixes, self._loading, self._tails, pool)
        self._builder = ScheduleBuilder(self._roster, self._departures, self._loading, self._tails, pool, limits)
        self._budget = limits.max_num_batched_tokens  # tokens of a step; less while memory is short

    @property
    def waiting(self) -> Sequence[Request]:
        """Sorted by policy; of several rows with one prompt, only the first."""
        return self._roster.waiting

    @property
    def running(self) -> Sequence[Request]:
        """Sorted by policy."""
        return self._roster.running

    @property
    def loading(self) -> Sequence[Request]:
        """Sorted by policy; they run as soon as a tier has loaded their blocks."""
        return self._roster.loading

    @property
    def num_preemptions(self) -> int:
        return self._departures.num_preemptions

    @property
    def num_prefix_queries(self) -> int:
        """Prompt tokens looked up in the prefix index so far."""
        return self._prefixes.num_queries

    @property
    def num_prefix_hits(self) -> int:
        """Those of them that were found there."""
        return self._prefixes.num_hits

    @property
    def num_tokens_loaded(self) -> int:
        """Tokens whose K/V a tier loaded, so that no request computed them."""
        return self._prefixes.num_loaded

    @property
    def num_tokens_asked(self) -> int:
        """Tokens looked up in tiers, because the prefix index lacked them."""
        return self._prefixes.num_asked

    # ---- adding and ending requests ----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could do anything: some request isn't held."""
        return any(not request.held for request in (*self.running, *self.waiting, *self.loading))

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the requests of one group: n samples of one prompt, or the rows of a lockstep group.

        Raises:
            InvalidRequestError: the group can never fit; nothing was queued.
        """
        lockstep = requests[0].group.lockstep
        at_once = requests if lockstep else requests[:1]
        set_max_total(requests, at_once, self.limits, self.pool.num_blocks, self.pool.block_size)
        siblings_of = by_prompt(requests)
        for leader in siblings_of:
            self._prefixes.digest(leader, leader.num_prompt)
        self._roster.arrive(siblings_of)

    def resume(
        self, requests: Sequence[Request], token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> None:
        """Give held requests the tokens that their selector's owner has chosen.

        ``parents``: request i continues the tokens and blocks of ``requests[parents[i]]`` (a beam step).
        """
        if parents is not None:
            forks.continue_from_parents(self.pool, requests, parents)
        for request, token in zip(requests, token_ids, strict=True):
            assert request.held and not request.finished, request
            request.tokens.append(token)
            request.held = False

    def recompute(self, requests: Iterable[Request]) -> None:
        """Let held requests that lost their blocks compute their tokens again. Their selectors are then called
        again."""
        for request in requests:
            if request.held and request.status is RequestStatus.WAITING:
                request.held = False

    def preempt_held(self) -> bool:
        """Preempt the last held request, or its group, so that waiting ones can start. Returns False if none waits or
        none is held."""
        held = [request for request in self.running if request.held]
        if not held or all(request.held for request in (*self.waiting, *self.running)):
            return False
        self._departures.preempt(held[-1])
        return True

    def forget_cached(self) -> None:
        """Make all K/V computed until now unfindable, because they belong to a model that has changed. Running requests
        go on with theirs."""
        for load in self._loading.all():
            self._departures.abandon(load)
        self._tails.abandon_all()
        self._prefixes.forget_all(self.running)

    @property
    def loads(self) -> Sequence[Load]:
        """Return the loads that tiers have not finished."""
        return [*self._loading.all(), *self._tails.loads]

    def lacking(self, load: Load) -> Collection[int]:
        """Return the blocks of a load that are still wanted. Call this, and the methods that follow, between two
        steps."""
        return self._tails.lacking(load) if load.beside else self._loading.lacking(load)

    def arrived(self, load: Load, blocks: Collection[int]) -> None:
        """Note that some blocks of a load are in the cache. A request that computes beside the load continues behind
        them."""
        if load.beside:
            self._tails.arrived(load, blocks)

    def landed(self, load: Load, lost: Collection[int] = ()) -> None:
        """End a load. Its blocks are in the cache, except those ``lost``. Its requests run from now on, and compute the
        rest."""
        if load.beside:
            self._tails.land(load)
        else:
            self._loading.land(load, lost)

    def finish(
        self, requests: Iterable[Request], reason: FinishReason, error: str | None = None
    ) -> list[RequestOutput]:
        """End requests between two steps: they were cancelled or failed, or a stop string ended them. Their blocks are
        released."""
        outputs = []
        for request in requests:
            if not request.finished:
                self._departures.end(request, reason, error)
                outputs.append(RequestOutput(request, (), None, reason, error))
        self._roster.drop_finished()
        return outputs

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Give out the step's token budget: running requests first, then as many waiting ones as fit."""
        budget = self._budget
        self._budget = min(budget + budget // 256 + 1, self.limits.max_num_batched_tokens)
        chunks, moves, preempted, *_ = self._builder.build(budget, self._admission)
        loads, self._loading.begun = self._loading.begun, []
        return Schedule(chunks, moves, preempted, self._given_up(), loads)

    def repeat(self, schedule: Schedule) -> Schedule | None:
        """Return the step after ``schedule``, before its tokens are known: one more token for each request that can't
        have reached its length. Call ``update`` later, without the requests that have ended by then.

        Returns None if the step can't be predicted: not all requests sample, others are to be served, or no blocks are
        spare.
        """
        if self._somebody_may_start():
            return None
        chunks = stretches.repeat(schedule, self.running, self.pool)
        return Schedule(chunks, (), (), self._given_up()) if chunks else None

    def stretch(self, most: int) -> Stretch | None:
        """Return the next steps, at most ``most``, that do nothing but compute one token for each running request.
        Returns None if the next step must be scheduled, because a request may start, lacks more than a token, or may
        stop before its length."""
        limits = self.limits
        if self._somebody_may_start():
            return None
        if self.loading or self._tails or limits.sliding_window or self._budget < limits.max_num_batched_tokens:
            return None
        return stretches.find(self.running, self.pool, most)

    def leap(self, stretch: Stretch, num_steps: int, token: int) -> list[RequestOutput]:
        """Take the first ``num_steps`` of a stretch at once, giving each request ``token`` in each of them. The result
        is the same as that of so many calls of ``schedule`` and ``update``. Returns an output for each request that
        ends with the last step."""
        stretches.walk(stretch, num_steps, token, self.pool, self._prefixes.publish)
        ended = [request for request in stretch.requests if len(request.tokens) >= request.max_total]
        for request in ended:
            self._departures.end(request, FinishReason.LENGTH)
        self._roster.drop_finished()
        return [RequestOutput(request, (token,), None, FinishReason.LENGTH) for request in ended]

    def fills_blocks(self, schedule: Schedule) -> list[bool]:
        """Return for each chunk whether ``update`` would publish blocks that become full with it."""
        if not self.limits.enable_prefix_caching:
            return [False] * len(schedule.chunks)
        size = self.pool.block_size
        return [
            (start + num_tokens) // size > request.num_published for request, start, num_tokens, _ in schedule.chunks
        ]

    def update(
        self, schedule: Schedule, selection: Selection, not_finite: Collection[Request] = ()
    ) -> list[RequestOutput]:
        """Take in what the step computed and the tokens that were selected. Returns an output for each row that sampled
        or ended.

        ``not_finite``: requests whose results in this step were not finite. No other request may find their blocks.
        """
        rows: list[Request] = []
        size, has_tails = self.pool.block_size, bool(self._tails)
        for request, start, num_tokens, samples in schedule.chunks:
            request.num_computed = computed = start + num_tokens
            if request in not_finite:
                self._prefixes.distrust(request)
            elif computed // size > request.num_published:
                self._prefixes.publish(request, computed)
            if has_tails:
                self._tails.advance(request)
            if len(samples) > 1:
                forks.fork(self.pool, request, self._roster.take_forks(request))
            rows.extend(samples)
        if selection.parents is not None:
            forks.continue_from_parents(self.pool, rows, selection.parents)
        outputs = results.take_in(rows, selection, self._departures)
        if self.limits.sliding_window is not None:
            for chunk in schedule.chunks:
                self._leave_window(chunk.request, self.limits.sliding_window)
        self._roster.drop_finished()
        return outputs

    def shrink(self, num_tokens: int) -> None:
        """Give out at most so many tokens in a step for a while, because memory had no room for more; then a few more
        each step. Each running request still gets a token."""
        self._budget = max(min(num_tokens, self._budget), self.limits.max_num_seqs)

    def check(self) -> None:
        """Assert every invariant of requests and blocks; for tests."""
        self.pool.check(request.block_table for request in (*self.running, *self.loading))
        self._roster.check()
        self._prefixes.check()
        self._loading.check()
        self._tails.check()
        assert self._roster.num_seats <= self.limits.max_num_seqs
        for request in self.running:
            assert request.num_computed <= len(request.block_table) * self.pool.block_size

    # ---- helpers -------------------------------------------------------------------------------------------

    def _somebody_may_start(self) -> bool:
        return bool(self.waiting) and self._roster.num_seats < self.limits.max_num_seqs

    def _leave_window(self, request: Request, window: int) -> None:
        """Release blocks that no later query can see, in a model whose layers all have a sliding window."""
        request.block_table.leave_behind(self.pool, (request.num_computed + 1 - window) // self.pool.block_size)

    def _given_up(self) -> list[BlockContent]:
        """Return the contents of blocks evicted since the last call, if a tier wants them."""
        given_up = self.pool.take_given_up()
        if not given_up or self._stored is None or self._stored.wants_more:
            return given_up if self._stored is not None else []
        wanted = self._prefixes.asked_back() if self._stored.wants_back else ()
        return [content for content in given_up if content.digest in wanted]

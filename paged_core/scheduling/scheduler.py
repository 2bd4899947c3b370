"""Scheduler: which tokens of which requests the next step computes, and what its results mean for each request.

There is no prefill phase and no decode phase. Each running request lacks some tokens (``len(tokens) - num_computed``:
one while it decodes, many while its prompt is new) and is given as many as the step's token budget allows. Requests
join and leave at every step. The cost of a step grows with the number of running requests, not with their lengths.

The scheduler and its parts (who waits and runs, prefixes, admission, who gets how much of a step, departures, block
tables) are the only ones that change requests and, through the BlockPool, block ownership.
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
        stored: what a tier holds; None: there is none.
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
        self._budget = limits.max_num_batched_tokens  # less while memory is short

    @property
    def waiting(self) -> Sequence[Request]:
        """Sorted by policy; of rows with one prompt only the first."""
        return self._roster.waiting

    @property
    def running(self) -> Sequence[Request]:
        """Sorted by policy."""
        return self._roster.running

    @property
    def loading(self) -> Sequence[Request]:
        """Sorted by policy; they run as soon as their blocks have come from a tier."""
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
        """And found there."""
        return self._prefixes.num_hits

    @property
    def num_tokens_loaded(self) -> int:
        """Tokens that nobody had to compute, since a tier has brought them."""
        return self._prefixes.num_loaded

    @property
    def num_tokens_asked(self) -> int:
        """Tokens looked for in tiers, since the prefix index had not got them."""
        return self._prefixes.num_asked

    # ---- in and out --------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could be of use: somebody isn't held."""
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

        ``parents``: request i goes on from ``requests[parents[i]]``'s tokens and blocks (a beam step).
        """
        if parents is not None:
            forks.continue_from_parents(self.pool, requests, parents)
        for request, token in zip(requests, token_ids, strict=True):
            assert request.held and not request.finished, request
            request.tokens.append(token)
            request.held = False

    def recompute(self, requests: Iterable[Request]) -> None:
        """Have held requests that lost their blocks compute their tokens again; their selectors are asked again."""
        for request in requests:
            if request.held and request.status is RequestStatus.WAITING:
                request.held = False

    def preempt_held(self) -> bool:
        """Preempt the last held request, or its group, for those who wait. False: nobody waits, or nobody is held."""
        held = [request for request in self.running if request.held]
        if not held or all(request.held for request in (*self.waiting, *self.running)):
            return False
        self._departures.preempt(held[-1])
        return True

    def forget_cached(self) -> None:
        """K/V computed until now are another model's: nobody else may find them, whoever goes on with them."""
        for load in self._loading.all():
            self._departures.abandon(load)
        self._tails.abandon_all()
        self._prefixes.forget_all(self.running)

    @property
    def loads(self) -> Sequence[Load]:
        """That tiers are to bring."""
        return [*self._loading.all(), *self._tails.loads]

    def lacking(self, load: Load) -> Collection[int]:
        """Blocks of a load that are still of use if they come now. Between two steps, like what follows."""
        return self._tails.lacking(load) if load.beside else self._loading.lacking(load)

    def arrived(self, load: Load, blocks: Collection[int]) -> None:
        """Some of the blocks of a load are in the cache: who computes beside it goes on behind them."""
        if load.beside:
            self._tails.arrived(load, blocks)

    def landed(self, load: Load, lost: Collection[int] = ()) -> None:
        """The blocks of a load are in the cache, but those ``lost``, and no more will come: its rows run from now on,
        or compute what is lacking."""
        if load.beside:
            self._tails.land(load)
        else:
            self._loading.land(load, lost)

    def finish(
        self, requests: Iterable[Request], reason: FinishReason, error: str | None = None
    ) -> list[RequestOutput]:
        """End requests between two steps: cancelled, stopped by a stop string, or failed. Their blocks are freed."""
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
        """The step after ``schedule``, before anybody knows its tokens: one more for each request that can't have
        reached its length. ``update`` comes after, without the requests that have ended by then.

        None: it can't be told. Not all of them sample, others are to be served, or there are no blocks to spare.
        """
        if self._somebody_may_start():
            return None
        chunks = stretches.repeat(schedule, self.running, self.pool)
        return Schedule(chunks, (), (), self._given_up()) if chunks else None

    def stretch(self, most: int) -> Stretch | None:
        """The steps that come next, ``most`` of them at most, as long as all that they do is one token for each running
        request. None: the next one must be scheduled, since somebody may start, lacks more than a token, or may stop
        before his length."""
        limits = self.limits
        if self._somebody_may_start():
            return None
        if self.loading or self._tails or limits.sliding_window or self._budget < limits.max_num_batched_tokens:
            return None
        return stretches.find(self.running, self.pool, most)

    def leap(self, stretch: Stretch, num_steps: int, token: int) -> list[RequestOutput]:
        """The first ``num_steps`` of a stretch, in each of which ``token`` is what each request is given: the same as
        ``schedule`` and ``update`` so many times. Tells who has ended with the last of them."""
        stretches.walk(stretch, num_steps, token, self.pool, self._prefixes.publish)
        ended = [request for request in stretch.requests if len(request.tokens) >= request.max_total]
        for request in ended:
            self._departures.end(request, FinishReason.LENGTH)
        self._roster.drop_finished()
        return [RequestOutput(request, (token,), None, FinishReason.LENGTH) for request in ended]

    def fills_blocks(self, schedule: Schedule) -> list[bool]:
        """Of each chunk, whether ``update`` would let others find blocks that are full with it."""
        if not self.limits.enable_prefix_caching:
            return [False] * len(schedule.chunks)
        size = self.pool.block_size
        return [
            (start + num_tokens) // size > request.num_published for request, start, num_tokens, _ in schedule.chunks
        ]

    def update(
        self, schedule: Schedule, selection: Selection, not_finite: Collection[Request] = ()
    ) -> list[RequestOutput]:
        """Take in what the step computed and what was selected; tell what is new of each sampled request.

        ``not_finite``: requests for which the step has not computed numbers: nobody else may find their blocks.
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
        """Memory had room for so many tokens and not for a whole step: give out no more, for a while; then a little
        more each step. Each running request still gets a token."""
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

    # ---- their parts -------------------------------------------------------------------------------------------

    def _somebody_may_start(self) -> bool:
        return bool(self.waiting) and self._roster.num_seats < self.limits.max_num_seqs

    def _leave_window(self, request: Request, window: int) -> None:
        """Blocks that no later query can see are given back, in a model whose layers all have a sliding window."""
        request.block_table.leave_behind(self.pool, (request.num_computed + 1 - window) // self.pool.block_size)

    def _given_up(self) -> list[BlockContent]:
        """What the cache has given up since this was asked the last time, if a tier wants it."""
        given_up = self.pool.take_given_up()
        if not given_up or self._stored is None or self._stored.wants_more:
            return given_up if self._stored is not None else []
        wanted = self._prefixes.asked_back() if self._stored.wants_back else ()
        return [content for content in given_up if content.digest in wanted]

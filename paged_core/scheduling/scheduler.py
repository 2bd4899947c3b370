"""Scheduler: which tokens of which requests the next step computes, and what its results mean for each request.

There is no prefill phase and no decode phase. Each running request lacks some tokens (``len(tokens) - num_computed``:
one while it decodes, many while its prompt is new) and is given as many as the step's token budget allows. Requests
join and leave at every step. The cost of a step grows with the number of running requests, not with their lengths.

The scheduler and its parts (who waits and runs, prefixes, admission, block tables) are the only ones that change
requests and, through the BlockPool, block ownership.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from paged_core.scheduling import forks, stretches
from paged_core.scheduling.admission import Admission
from paged_core.scheduling.block_pool import BlockContent, BlockPool
from paged_core.scheduling.block_table import BlockMove
from paged_core.scheduling.capacity import set_max_total
from paged_core.scheduling.loading import Loading
from paged_core.scheduling.policies import SchedulingPolicy
from paged_core.scheduling.prefixes import Prefixes, Stored
from paged_core.scheduling.request import (
    FinishReason,
    Request,
    RequestOutput,
    RequestStatus,
    Selection,
)
from paged_core.scheduling.roster import Roster, by_prompt, lockstep_rows
from paged_core.scheduling.schedule import Limits, Load, Schedule, ScheduledChunk
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
        self.num_preemptions = 0
        self._stored = stored
        self._roster = Roster(policy)
        self._prefixes = Prefixes(pool, limits, stored)
        self._loading = Loading(self._roster, self._prefixes, pool)
        self._tails = Tails(self._roster, self._prefixes, pool, stored)
        self._admission = Admission(self._roster, self._prefixes, self._loading, self._tails, pool, limits)
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
        self._preempt(held[-1], _Step(0))
        return True

    def forget_cached(self) -> None:
        """K/V computed until now are another model's: nobody else may find them, whoever goes on with them."""
        for load in self._loading.all():
            self._abandon(load)
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
                if request.status is RequestStatus.LOADING:
                    self._abandon(self._loading.of(request))
                self._end(request, reason, error)
                outputs.append(RequestOutput(request, (), None, reason, error))
        self._roster.drop_finished()
        return outputs

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """Give out the step's token budget: running requests first, then as many waiting ones as fit."""
        step = _Step(self._budget)
        self._budget = min(self._budget + self._budget // 256 + 1, self.limits.max_num_batched_tokens)
        self._schedule_running(step)
        while not step.chunks and not all(request.held for request in self.running):
            # Everyone yielded to a request that was preempted a moment ago: somebody must give way.
            self._preempt(self.running[-1], step)
            self._schedule_running(step)
        if self.waiting and not step.preempted and step.budget > 0:
            self._admit(step)
        loads, self._loading.begun = self._loading.begun, []
        return Schedule(step.chunks, step.moves, step.preempted, self._given_up(), loads)

    def repeat(self, schedule: Schedule) -> Schedule | None:
        """The step after ``schedule``, before anybody knows its tokens: one more for each request that can't have
        reached its length. ``update`` comes after, without the requests that have ended by then.

        None: it can't be told. Not all of them sample, others are to be served, or there are no blocks to spare.
        """
        if self.waiting and self._roster.num_seats < self.limits.max_num_seqs:
            return None
        if sum(not request.held for request in self.running) != len(schedule.chunks):
            return None
        chunks, without_block = [], []
        for request, start, num_tokens, samples in schedule.chunks:
            position = start + num_tokens
            if samples != (request,) or request.group.lockstep:
                return None
            if position + 1 >= request.max_total:
                continue
            if position == len(request.block_table) * self.pool.block_size:
                without_block.append((request, position))  # else its last block is its own: ``schedule`` writes to it
            chunks.append(ScheduledChunk(request, position, 1, samples))
        if not chunks or self.pool.num_available < len(without_block):
            return None
        for request, position in without_block:
            request.block_table.extend(self.pool, position, 1)
        return Schedule(chunks, (), (), self._given_up())

    def stretch(self, most: int) -> Stretch | None:
        """The steps that come next, ``most`` of them at most, as long as all that they do is one token for each running
        request. None: the next one must be scheduled, since somebody may start, lacks more than a token, or may stop
        before his length."""
        limits = self.limits
        if self.waiting and self._roster.num_seats < limits.max_num_seqs:
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
            self._end(request, FinishReason.LENGTH, None)
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
        outputs = self._append_all(rows, selection)
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

    # ---- running requests --------------------------------------------------------------------------------------

    def _schedule_running(self, step: _Step) -> None:
        running = self._roster.running
        step.num_to_serve = len(running)
        i = 0
        while i < len(running):  # shrinks from its end while requests are preempted
            request = running[i]
            if request.group.lockstep:
                rows = lockstep_rows(request)
                i += len(rows)
                step.num_to_serve -= len(rows)
                if not request.held:
                    self._schedule_rows(rows, step)
                continue
            i += 1
            step.num_to_serve -= 1
            if request.held:
                continue
            start = request.num_computed
            if len(request.tokens) - start > 1:
                self._schedule_rows((request,), step)
            elif request.block_table.has_slot(self.pool, start) or self._make_room(request, 1, (request,), step):
                step.budget -= 1
                step.chunks.append(ScheduledChunk(request, start, 1, self._roster.samples(request)))

    def _schedule_rows(self, rows: Sequence[Request], step: _Step) -> None:
        """Give one request, or the rows of one lockstep group, their tokens; all rows sample or none does."""
        lacks = [len(row.tokens) - row.num_computed for row in rows]
        if self._tails:
            lacks = [self._tails.chunk(row, lack) for row, lack in zip(rows, lacks, strict=True)]
        # Each request yet to be served has one token of the budget for certain.
        budget = step.budget - step.num_to_serve
        if len(rows) > 1 and sum(lacks) > budget:
            lacks = [lack - 1 for lack in lacks]  # no row may sample before all can
        sizes = []
        for row, lack in zip(rows, lacks, strict=True):
            size = min(lack, budget)
            if row.wants_prompt_logprobs:
                size = min(size, self.limits.max_prompt_logprob_rows)
            sizes.append(size)
            budget -= size
        if len(rows) > 1 and any(
            row.num_computed + size < len(row.tokens) for row, size in zip(rows, sizes, strict=True)
        ):
            sizes = [min(size, len(row.tokens) - row.num_computed - 1) for row, size in zip(rows, sizes, strict=True)]
        for row, size in zip(rows, sizes, strict=True):
            if size and not self._make_room(row, size, rows, step):
                return
        for row, size in zip(rows, sizes, strict=True):
            if size:
                self._emit(row, size, step)

    def _emit(self, request: Request, num_tokens: int, step: _Step) -> None:
        start = request.num_computed
        samples: tuple[Request, ...] = ()
        if start + num_tokens == len(request.tokens):
            samples = self._roster.samples(request)
        step.budget -= num_tokens
        step.chunks.append(ScheduledChunk(request, start, num_tokens, samples))

    def _make_room(self, request: Request, num_tokens: int, rows: Sequence[Request], step: _Step) -> bool:
        """Blocks for the next ``num_tokens`` tokens; a shared last block is copied on write. False: not now."""
        # Counted anew after each preemption: a block that only the victim shared needs no copy any more.
        while self.pool.num_available < request.block_table.num_lacking(self.pool, request.num_computed, num_tokens):
            if step.admitting:
                return False
            load = self._loading.last()
            if load is not None:  # it has computed nothing that would be lost
                self._abandon(load)
                continue
            victim = self._victim(rows)
            if victim is None:
                return False
            self._preempt(victim, step)
        step.moves += request.block_table.extend(self.pool, request.num_computed, num_tokens)
        return True

    def _victim(self, rows: Sequence[Request]) -> Request | None:
        """The last running request behind ``rows`` that has made progress since it was preempted the last time."""
        last = rows[-1]
        for request in reversed(self.running):
            if request is last:
                break
            if len(request.tokens) > request.num_recomputed_to:
                return request
        return None

    def _preempt(self, request: Request, step: _Step) -> None:
        """Take a request (or its whole lockstep group) off the device; it will compute its tokens again, or load them:
        its full blocks can be found, and go to a tier when the cache evicts them.

        The one place where preemption happens.
        """
        for row in lockstep_rows(request) if request.group.lockstep else (request,):
            self._prefixes.swap_out(row)
            self._release(row)
            row.num_recomputed_to = len(row.tokens)
            self._roster.send_back(row)
            step.preempted.append(row)
            self.num_preemptions += 1

    def _abandon(self, load: Load) -> None:
        """Its rows wait for their turn again, without blocks."""
        for row in self._loading.abandon(load):
            self._release(row)
            self._roster.send_back(row)

    def _given_up(self) -> list[BlockContent]:
        """What the cache has given up since this was asked the last time, if a tier wants it."""
        given_up = self.pool.take_given_up()
        if not given_up or self._stored is None or self._stored.wants_more:
            return given_up if self._stored is not None else []
        wanted = self._prefixes.asked_back() if self._stored.wants_back else ()
        return [content for content in given_up if content.digest in wanted]

    def _admit(self, step: _Step) -> None:
        step.admitting = True
        for rows in self._admission.start_those_that_fit():
            self._schedule_rows(rows, step)
            if step.budget <= 0:
                return

    # ---- results -----------------------------------------------------------------------------------------------

    def _append_all(self, rows: Sequence[Request], selection: Selection) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        errors, verdicts, logprobs = selection.errors or {}, selection.finished or {}, selection.logprobs
        for i, request in enumerate(rows):
            if request.status is RequestStatus.FINISHED:  # another row of its lockstep group has failed
                continue
            if i in errors:
                outputs.extend(self._fail(request, errors[i]))
                continue
            token = selection.token_ids[i]
            if token is None:
                request.held = True
                continue
            request.tokens.append(token)
            reason = None
            if token in request.stop_token_ids:
                reason = FinishReason.STOP
            elif i in verdicts:
                reason = verdicts[i]
            elif len(request.tokens) >= request.max_total:
                reason = FinishReason.LENGTH
            if reason is not None:
                self._end(request, reason, None)
            chosen = logprobs[i] if logprobs is not None else None
            outputs.append(RequestOutput(request, (token,), (chosen,) if chosen is not None else None, reason))
        return outputs

    def _fail(self, request: Request, error: str) -> Iterator[RequestOutput]:
        rows = request.group.members if request.group.lockstep else (request,)
        for row in [row for row in rows if not row.finished]:
            self._end(row, FinishReason.ERROR, error)
            yield RequestOutput(row, (), None, FinishReason.ERROR, error)

    def _end(self, request: Request, reason: FinishReason, error: str | None) -> None:
        first_fork = self._roster.end(request)
        if first_fork is not None:
            forks.fork(self.pool, request, (first_fork,))  # it goes on with what has been computed of their prompt
        self._release(request)
        request.finish_reason = reason
        request.error = error

    def _has_slot(self, request: Request) -> bool:
        return request.block_table.has_slot(self.pool, request.num_computed)

    def _leave_window(self, request: Request, window: int) -> None:
        """Blocks that no later query can see are given back, in a model whose layers all have a sliding window."""
        request.block_table.leave_behind(self.pool, (request.num_computed + 1 - window) // self.pool.block_size)

    def _release(self, request: Request) -> None:
        self._tails.abandon((request,))
        request.block_table.shorten(self.pool, 0)
        self._prefixes.abandon(request)
        request.num_computed = request.num_published = 0


class _Step:
    """The schedule while it is being made."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.admitting = False  # a newcomer never preempts
        self.num_to_serve = 0  # running requests that have not had their turn
        self.chunks: list[ScheduledChunk] = []
        self.moves: list[BlockMove] = []
        self.preempted: list[Request] = []

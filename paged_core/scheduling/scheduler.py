"""Scheduler: which tokens of which requests the next step computes, and what its results mean for each request.

There is no prefill phase and no decode phase. Each running request lacks some tokens (``len(tokens) - num_computed``:
one while it decodes, many while its prompt is new) and is given as many as the step's token budget allows. Requests
join and leave at every step. The cost of a step grows with the number of running requests, not with their lengths.

The scheduler is the only one that changes requests and, through the BlockPool, block ownership.
"""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockPool
from paged_core.scheduling.capacity import max_blocks_at_once, set_max_total
from paged_core.scheduling.policies import SchedulingPolicy
from paged_core.scheduling.request import (
    FinishReason,
    Request,
    RequestOutput,
    RequestStatus,
    Selection,
)
from paged_core.scheduling.schedule import BlockMove, Limits, Schedule, ScheduledChunk


class Scheduler:
    """Continuous batching (Orca: Yu et al., OSDI 2022) with chunked prefill over paged blocks."""

    def __init__(self, pool: BlockPool, policy: SchedulingPolicy, limits: Limits) -> None:
        self.pool = pool
        self.policy = policy
        self.limits = limits
        self.waiting: list[Request] = []  # sorted by policy; of rows with one prompt only the first
        self.running: list[Request] = []  # sorted by policy
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the prefix index
        self.num_prefix_hits = 0  # and found there
        self._budget = limits.max_num_batched_tokens  # less while memory is short
        self._num_arrivals = 0
        self._unborn: dict[Request, list[Request]] = {}  # siblings that will fork from a request's prompt
        self._in_flight: dict[bytes, Request] = {}  # blocks being computed: who shares them waits for them
        self._max_blocks_at_once = max_blocks_at_once(limits, pool.block_size)

    # ---- in and out --------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could be of use: somebody isn't held."""
        return any(not request.held for request in self.running) or any(not request.held for request in self.waiting)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the requests of one group: n samples of one prompt, or the rows of a lockstep group.

        Raises:
            InvalidRequestError: the group can never fit; nothing was queued.
        """
        lockstep = requests[0].group.lockstep
        at_once = requests if lockstep else requests[:1]
        set_max_total(requests, at_once, self.limits, self.pool.num_blocks, self.pool.block_size)
        leaders: dict[tuple[int, ...], Request] = {}  # by prompt
        for request in requests:
            request.arrival = self._num_arrivals
            leader = leaders.setdefault(tuple(request.tokens), request)
            if leader is not request:
                request.status = RequestStatus.UNBORN
                self._unborn.setdefault(leader, []).append(request)
        self._num_arrivals += 1
        for request in leaders.values():
            if self.limits.enable_prefix_caching:
                self.pool.extend_digests(request.digests, request.tokens, request.params.cache_salt)
            insort(self.waiting, request, key=self._key)

    def resume(
        self, requests: Sequence[Request], token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> None:
        """Give held requests the tokens that their selector's owner has chosen.

        ``parents``: request i goes on from ``requests[parents[i]]``'s tokens and blocks (a beam step).
        """
        if parents is not None:
            _continue_from_parents(self.pool, requests, parents)
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
        self.pool.forget_all()
        self._in_flight.clear()
        for request in self.running:
            request.num_published = sys.maxsize  # the blocks it has, and fills, are mixed

    def finish(
        self, requests: Iterable[Request], reason: FinishReason, error: str | None = None
    ) -> list[RequestOutput]:
        """End requests between two steps: cancelled, stopped by a stop string, or failed. Their blocks are freed."""
        outputs = []
        for request in requests:
            if not request.finished:
                self._end(request, reason, error)
                outputs.append(RequestOutput(request, (), None, reason, error))
        self._drop_finished()
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
        if not step.preempted:
            step.admitting = True
            self._admit(step)
        return Schedule(step.chunks, step.moves, step.preempted)

    def repeat(self, schedule: Schedule) -> Schedule | None:
        """The step after ``schedule``, before anybody knows its tokens: one more for each request that can't have
        reached its length. ``update`` comes after, without the requests that have ended by then.

        None: it can't be told. Not all of them sample, others are to be served, or there are no blocks to spare.
        """
        if self.waiting and self._num_seats() < self.limits.max_num_seqs:
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
                without_block.append(request)  # else its last block is its own: ``schedule`` writes to it
            chunks.append(ScheduledChunk(request, position, 1, samples))
        if not chunks or self.pool.num_available < len(without_block):
            return None
        for request in without_block:
            request.block_table.append(self.pool.allocate())
        return Schedule(chunks, (), ())

    def update(self, schedule: Schedule, selection: Selection) -> list[RequestOutput]:
        """Take in what the step computed and what was selected; tell what is new of each sampled request."""
        rows: list[Request] = []
        size = self.pool.block_size
        for request, start, num_tokens, samples in schedule.chunks:
            request.num_computed = computed = start + num_tokens
            if computed // size > request.num_published:
                self._publish(request)
            if len(samples) > 1:
                self._fork(request, samples)
            rows.extend(samples)
        if selection.parents is not None:
            _continue_from_parents(self.pool, rows, selection.parents)
        outputs = self._append_all(rows, selection)
        if self.limits.sliding_window is not None:
            for chunk in schedule.chunks:
                self._give_back_behind_window(chunk.request, self.limits.sliding_window)
        if any(request.status is RequestStatus.FINISHED for request in rows):
            self._drop_finished()
        return outputs

    def shrink(self, num_tokens: int) -> None:
        """Memory had room for so many tokens and not for a whole step: give out no more, for a while; then a little
        more each step. Each running request still gets a token."""
        self._budget = max(min(num_tokens, self._budget), self.limits.max_num_seqs)

    def check(self) -> None:
        """Assert every invariant of requests and blocks; for tests."""
        self.pool.check(request.block_table for request in self.running)
        assert all(r.status is RequestStatus.RUNNING for r in self.running)
        assert all(r.status is RequestStatus.WAITING and not r.block_table for r in self.waiting)
        assert all(r.status is RequestStatus.UNBORN for rows in self._unborn.values() for r in rows)
        assert self.running == sorted(self.running, key=self._key)
        assert self.waiting == sorted(self.waiting, key=self._key)
        assert self._num_seats() <= self.limits.max_num_seqs
        for request in self.running:
            assert request.num_computed <= len(request.block_table) * self.pool.block_size
        assert all(owner.status is RequestStatus.RUNNING for owner in self._in_flight.values())

    # ---- running requests --------------------------------------------------------------------------------------

    def _schedule_running(self, step: _Step) -> None:
        step.num_to_serve = len(self.running)
        i = 0
        while i < len(self.running):  # shrinks from its end while requests are preempted
            request = self.running[i]
            if request.group.lockstep:
                rows = _lockstep_rows(request)
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
            elif self._has_slot(request, start) or self._make_room(request, 1, (request,), step):
                self._emit(request, 1, step)

    def _has_slot(self, request: Request, position: int) -> bool:
        """Whether the next token fits into the last block as it stands: so it does in nearly all steps of a decode."""
        block, offset = divmod(position, self.pool.block_size)
        return offset > 0 and not self.pool.is_shared(request.block_table[block])

    def _schedule_rows(self, rows: Sequence[Request], step: _Step) -> None:
        """Give one request, or the rows of one lockstep group, their tokens; all rows sample or none does."""
        lacks = [len(row.tokens) - row.num_computed for row in rows]
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
            samples = (request,)
            if self._unborn:
                samples += tuple(self._unborn.get(request, ()))
        step.budget -= num_tokens
        step.chunks.append(ScheduledChunk(request, start, num_tokens, samples))

    def _make_room(self, request: Request, num_tokens: int, rows: Sequence[Request], step: _Step) -> bool:
        """Blocks for the next ``num_tokens`` tokens; a shared last block is copied on write. False: not now."""
        pool, table = self.pool, request.block_table
        offset = request.num_computed % pool.block_size
        first = request.num_computed // pool.block_size
        copy = bool(offset) and pool.is_shared(table[first])
        last = (request.num_computed + num_tokens - 1) // pool.block_size
        needed = last + 1 - len(table) + copy
        if needed <= 0:
            return True
        while pool.num_available < needed:
            victim = None if step.admitting else self._victim(rows)
            if victim is None:
                return False
            self._preempt(victim, step)
        if copy and pool.is_shared(table[first]):  # else those preempted held the other references
            source, target = table[first], pool.allocate()
            pool.release((source,))
            table[first] = target
            request.table_version += 1
            step.moves.append(BlockMove(source, target))
        while len(table) <= last:
            table.append(pool.allocate())
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
        """Take a request (or its whole lockstep group) off the device; it will compute its tokens again.

        The one place where preemption happens: swapping blocks to host memory would start here.
        """
        for row in _lockstep_rows(request) if request.group.lockstep else (request,):
            self._release(row)
            row.status = RequestStatus.WAITING
            row.num_recomputed_to = len(row.tokens)
            self.running.remove(row)
            insort(self.waiting, row, key=self._key)
            step.preempted.append(row)
            self.num_preemptions += 1

    # ---- admission ---------------------------------------------------------------------------------------------

    def _admit(self, step: _Step) -> None:
        if not self.waiting or step.budget <= 0:
            return
        num_seats = self._num_seats()
        promised = sum(self._blocks_lacking(request) for request in self.running)
        i = 0
        while i < min(len(self.waiting), self.limits.max_num_seqs) and step.budget > 0:
            head = self.waiting[i]
            rows = _lockstep_rows(head) if head.group.lockstep else [head]
            if head.held:
                i += len(rows)
                continue
            hits = [self._lookup(row) for row in rows]
            if any(self._comes_soon(row, len(hit)) for row, hit in zip(rows, hits, strict=True)):
                i += len(rows)  # it shares a block that is being computed now: cheaper to wait for it
                continue
            num_seats += sum(1 + len(self._unborn.get(row, ())) for row in rows)
            needed = sum(self._blocks_to_start(row, hit) for row, hit in zip(rows, hits, strict=True))
            reserve = self.limits.watermark_blocks if self.running else 0
            if num_seats > self.limits.max_num_seqs or self.pool.num_available - promised - needed < reserve:
                return
            for row, hit in zip(rows, hits, strict=True):
                self._start(row, hit)
            self._schedule_rows(rows, step)
            promised += sum(self._blocks_lacking(row) for row in rows)

    def _start(self, request: Request, hit: Sequence[int]) -> None:
        self.pool.share(hit)
        request.block_table = list(hit)
        request.table_version += 1
        request.num_computed = len(hit) * self.pool.block_size
        request.num_published = len(hit)
        request.status = RequestStatus.RUNNING
        if not request.num_recomputed_to:
            request.num_cached = request.num_computed
        self.num_prefix_queries += len(request.tokens)
        self.num_prefix_hits += request.num_computed
        for digest in request.digests[len(hit) :]:
            self._in_flight.setdefault(digest, request)
        self.waiting.remove(request)
        insort(self.running, request, key=self._key)

    def _lookup(self, request: Request) -> list[int]:
        if not self.limits.enable_prefix_caching or request.wants_prompt_logprobs:
            return []
        most = (len(request.tokens) - 1) // self.pool.block_size  # the last token is always computed
        hits = self.pool.match(request.digests[:most], request.tokens)
        if self.limits.sliding_window is not None:  # what lies behind the window already is not taken
            size = self.pool.block_size
            behind = max(0, (len(hits) * size + 1 - self.limits.sliding_window) // size)
            hits[:behind] = [NULL_BLOCK] * behind
        return hits

    def _comes_soon(self, request: Request, num_hits: int) -> bool:
        """Whether the first block that the request lacks is being computed for another one right now."""
        most = (len(request.tokens) - 1) // self.pool.block_size
        if num_hits >= min(most, len(request.digests)) or request.wants_prompt_logprobs:
            return False
        return request.digests[num_hits] in self._in_flight

    def _blocks_to_start(self, request: Request, hit: Sequence[int]) -> int:
        """Available blocks that a waiting request takes: new ones, and those of its hit that nobody uses now."""
        new = -(-len(request.tokens) // self.pool.block_size) - len(hit)
        return min(new + self.pool.num_unused(hit), self._max_blocks_at_once)

    def _blocks_lacking(self, request: Request) -> int:
        """Blocks that the known tokens of a request will still take."""
        lacking = -(-len(request.tokens) // self.pool.block_size) - len(request.block_table)
        return max(0, min(lacking, self._max_blocks_at_once))

    def _num_seats(self) -> int:
        unborn = (len(rows) for leader, rows in self._unborn.items() if leader.status is RequestStatus.RUNNING)
        return len(self.running) + sum(unborn)

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

    def _fork(self, leader: Request, samples: Sequence[Request]) -> None:
        """The prompt is computed: its siblings start from the same blocks, the partly filled last one included."""
        del self._unborn[leader]
        for sibling in samples[1:]:
            self.pool.share(leader.block_table)
            sibling.block_table = list(leader.block_table)
            sibling.table_version += 1
            sibling.digests = list(leader.digests)
            sibling.num_computed = sibling.num_cached = leader.num_computed
            sibling.num_published = leader.num_published
            sibling.status = RequestStatus.RUNNING
            insort(self.running, sibling, key=self._key)

    def _publish(self, request: Request) -> None:
        if not self.limits.enable_prefix_caching:
            return
        size = self.pool.block_size
        full = request.num_computed // size
        if len(request.digests) < full:
            self.pool.extend_digests(request.digests, request.tokens[: full * size], request.params.cache_salt)
        for i in range(request.num_published, full):
            digest = request.digests[i]
            self.pool.publish(request.block_table[i], digest, request.tokens[i * size : (i + 1) * size])
            if self._in_flight.get(digest) is request:
                del self._in_flight[digest]
        request.num_published = full

    def _give_back_behind_window(self, request: Request, window: int) -> None:
        """Free the blocks that no later query can see, in a model whose layers all have a sliding window."""
        table = request.block_table
        i = min((request.num_computed + 1 - window) // self.pool.block_size, len(table)) - 1
        while i >= 0 and table[i] != NULL_BLOCK:
            self.pool.release((table[i],))
            table[i] = NULL_BLOCK
            request.table_version += 1
            i -= 1

    def _key(self, request: Request) -> tuple[object, int, int]:
        # Requests that came together stay together, whatever the policy says of each.
        return (self.policy.key(request.group.members[0]), request.arrival, request.index)

    def _end(self, request: Request, reason: FinishReason, error: str | None) -> None:
        self._release(request)
        self._unborn.pop(request, None)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.error = error

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        for digest in request.digests[request.num_published :]:
            if self._in_flight.get(digest) is request:
                del self._in_flight[digest]
        request.block_table = []
        request.table_version += 1
        request.num_computed = request.num_published = 0

    def _drop_finished(self) -> None:
        self.running = [request for request in self.running if not request.finished]
        if any(request.finished for request in self.waiting):
            self.waiting = [request for request in self.waiting if not request.finished]


class _Step:
    """The schedule while it is being made."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.admitting = False  # a newcomer never preempts
        self.num_to_serve = 0  # running requests that have not had their turn
        self.chunks: list[ScheduledChunk] = []
        self.moves: list[BlockMove] = []
        self.preempted: list[Request] = []


def _lockstep_rows(request: Request) -> list[Request]:
    """The rows of its group that are there to be computed; those that will fork from them are not born yet."""
    ended_or_unborn = (RequestStatus.FINISHED, RequestStatus.UNBORN)
    return [row for row in request.group.members if row.status not in ended_or_unborn]


def _continue_from_parents(pool: BlockPool, rows: Sequence[Request], parents: Sequence[int]) -> None:
    """A beam step: each row goes on from its parent's tokens and blocks, which they then share."""
    moved = [(row, rows[parent]) for row, parent in zip(rows, parents, strict=True) if rows[parent] is not row]
    states = [(list(p.tokens), list(p.block_table), list(p.digests), p.num_computed, p.num_published) for _, p in moved]
    for _, table, *_ in states:
        pool.share(table)  # all before the first release: a table may be somebody's parent and somebody's child
    for (row, _), (tokens, table, digests, num_computed, num_published) in zip(moved, states, strict=True):
        pool.release(row.block_table)
        row.tokens, row.block_table, row.digests = tokens, table, digests
        row.num_computed, row.num_published = num_computed, num_published
        row.table_version += 1

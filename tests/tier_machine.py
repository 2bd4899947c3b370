"""A scheduler over a pool and a tier of integers, stepped by hand, to check that a row always reads its own K/V."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from paged_core.scheduling.block_pool import NULL_BLOCK, BlockContent, BlockPool
from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.request import Group, Request, Selection
from paged_core.scheduling.schedule import Limits, Load, Schedule
from paged_core.scheduling.scheduler import Scheduler

SIZE = 4


class Shelf:
    """A tier of integers. Its "K/V" are the tokens, the salt and the weights that they were computed from."""

    def __init__(self) -> None:
        self.kept: dict[bytes, list[Any]] = {}
        self.wants_more = self.wants_back = True
        self.quick = True
        self.beside = False

    def holds(self, digest: bytes) -> bool:
        return digest in self.kept

    def pays(self, num_blocks: int, num_tokens: int, beside: bool) -> bool:
        assert num_blocks > 0
        assert num_tokens > 0
        return self.quick

    def pays_beside(self, num_blocks: int, num_tokens: int) -> bool:
        assert 0 < num_blocks * SIZE < num_tokens + SIZE
        return self.beside

    def num_to_compute(self, num_blocks: int, num_tokens: int) -> int:
        assert (num_blocks - 1) * SIZE < num_tokens <= num_blocks * SIZE
        return num_tokens // 2


class Machine:
    """The scheduler with its "cache" and tier, stepped by hand."""

    def __init__(self, num_blocks: int, window: int | None) -> None:
        self.shelf = Shelf()
        limits = Limits(4, 12, 60, 0, 256, sliding_window=window)
        pool = BlockPool(num_blocks, SIZE, tells=True)
        self.scheduler = Scheduler(pool, Fcfs(), limits, self.shelf)
        self.window = window
        self.cache: dict[int, list[Any]] = {block: [None] * SIZE for block in range(num_blocks + 1)}
        self.coming: list[Load] = []
        self.weights = 0
        self.open: list[Request] = []
        self.ended: list[Request] = []

    def add(self, prompt: list[int], n: int, max_tokens: int, salt: str | None) -> None:
        group = Group()
        params = SamplingParams(n=n, max_tokens=max_tokens, cache_salt=salt)
        rows = [Request(str(len(self.open)), prompt, params, index=i, group=group) for i in range(n)]
        try:
            self.scheduler.add(rows)
        except InvalidRequestError:
            return
        self.open += rows

    def step(self, rnd: random.Random) -> None:
        schedule = self.scheduler.schedule()
        for content in schedule.offloads:
            self.shelf.kept[content.digest] = list(self.cache[content.block])
        self.coming += schedule.loads
        for source, target, _ in schedule.moves:
            self.cache[target] = list(self.cache[source])
        for request, start, num_tokens, _ in schedule.chunks:
            self.check_reads(request, start)
            for i in range(start, start + num_tokens):
                self.cache[request.block_table[i // SIZE]][i % SIZE] = self.truth(request, i)
        self.finish_step(schedule, rnd)

    def finish_step(self, schedule: Schedule, rnd: random.Random) -> None:
        sampled = [row for chunk in schedule.chunks for row in chunk.samples]
        outputs = self.scheduler.update(schedule, Selection([rnd.randrange(3) for _ in sampled]))
        self.take([output.request for output in outputs if output.finish_reason is not None])

    def take(self, ended: list[Request]) -> None:
        for request in ended:
            self.open.remove(request)  # this raises if the request has ended before
            self.ended.append(request)

    def truth(self, request: Request, i: int) -> tuple[Any, ...]:
        return (request.params.cache_salt or "", tuple(request.tokens[: i + 1]), self.weights)

    def check_reads(self, request: Request, num_tokens: int) -> None:
        first = max(0, num_tokens + 1 - self.window) if self.window is not None else 0
        for i in range(first, num_tokens):
            block = request.block_table[i // SIZE]
            assert block != NULL_BLOCK
            salt, tokens, _ = self.truth(request, i)
            assert self.cache[block][i % SIZE][:2] == (salt, tokens), f"{request} reads another's K/V at {i}"

    def land(self, load: Load, lost: set[int]) -> None:
        self.arrive(load, load.contents, lost)
        if load in self.coming:
            self.coming.remove(load)
            lost |= {content.block for content in load.contents if content.digest not in self.shelf.kept}
            self.scheduler.landed(load, lost)

    def arrive(self, load: Load, contents: Sequence[BlockContent], lost: set[int]) -> None:
        """Let a piece arrive. Nothing is written for an abandoned load."""
        lacking = self.scheduler.lacking(load)
        assert not (lacking and (load.abandoned or load.met))
        come = {block for block, digest, _, _ in contents if digest in self.shelf.kept and block in lacking - lost}
        for block, digest, _, _ in contents:
            if block in come:
                self.cache[block] = list(self.shelf.kept[digest])
        self.scheduler.arrived(load, come)
        if load.abandoned or load.met:
            self.coming.remove(load)

    def check(self) -> None:
        self.scheduler.check()
        for request in self.scheduler.running:
            if request.num_published < 1000:
                self.check_reads(request, request.num_computed)

    def drain(self, rnd: random.Random) -> None:
        for _ in range(2000):
            for load in list(self.coming):
                self.land(load, set())
            if not self.scheduler.has_work:
                break
            self.step(rnd)
            self.check()
        assert not self.open, f"never ended: {self.open}"
        assert self.scheduler.pool.num_used == 0

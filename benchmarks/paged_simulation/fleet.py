"""The fleet: requests arrive, a router sends each to a replica, replicas step. Time jumps from event to event."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import cast

from paged_core import ConfigError, InvalidRequestError, Request
from paged_ray.placement import OPEN_COST, Placement
from paged_simulation.costs import CostModel
from paged_simulation.replica import Record, SimulatedReplica, Sizes, new_request
from paged_simulation.traffic import Arrival, Beginning

ROUTINGS = ("prefix", "load", "round-robin", "random")
Progress = Callable[[int, float], None]
_TOLD_EVERY = 20_000  # requests


@dataclass(frozen=True)
class Fleet:
    """Replicas of one kind, and how requests are sent to them."""

    sizes: Sizes
    num_replicas: int = 1
    routing: str = "prefix"  # as paged_ray does it; load: power of two choices; round-robin; random
    open_cost: int = OPEN_COST  # weight of an open request in prefix routing, in prompt tokens
    report_s: float = 1.0  # between two reports of what replicas have cached
    leaps: bool = True  # take predictable steps at once; changes only the time of the simulation
    seed: int = 0


@dataclass(frozen=True)
class SimulationOutcome:
    """The outcome of a simulation."""

    record: Record
    span_s: float  # simulated, from the first arrival to the last token
    num_refused: int  # that can never fit
    num_prefix_queries: int  # prompt tokens looked up
    num_prefix_hits: int
    num_preemptions: int
    num_steps: int
    busy: tuple[float, ...]  # of each replica: share of the span in steps


def simulate(
    arrivals: Iterator[Arrival], fleet: Fleet, costs: CostModel, progress: Progress | None = None
) -> SimulationOutcome:
    """Let the requests come, and run until all have ended."""
    return _Simulation(fleet, costs, progress).run(arrivals)


class _Simulation:
    def __init__(self, fleet: Fleet, costs: CostModel, progress: Progress | None) -> None:
        if fleet.routing not in ROUTINGS:
            raise ConfigError(f"routing is {fleet.routing!r}; use one of {', '.join(ROUTINGS)}")
        self._fleet, self._progress = fleet, progress
        self._rng = random.Random(fleet.seed)
        self._record = Record()
        key, tells_s = secrets.token_bytes(32), fleet.report_s if fleet.routing == "prefix" else None
        self._replicas = [
            SimulatedReplica(fleet.sizes, costs, key, self._record, tells_s=tells_s, leaps=fleet.leaps)
            for _ in range(fleet.num_replicas)
        ]
        self._placement = Placement(fleet.sizes.block_size, fleet.open_cost)
        self._placement.update(range(fleet.num_replicas))
        self._ends: list[tuple[float, int]] = []  # a heap: (end of steps, replica); some end sooner than it says
        self._pool = self._replicas[0].pool  # all of them name blocks alike
        self._beginnings: dict[int, list[bytes]] = {}
        self._turn = 0
        self._num_refused = 0

    def run(self, arrivals: Iterator[Arrival]) -> SimulationOutcome:
        now = began = -1.0
        for number, arrival in enumerate(arrivals):
            began = arrival.at_s if began < 0 else began
            now = self._run_until(arrival.at_s, now)
            self._take(number, arrival)
            if self._progress is not None and number % _TOLD_EVERY == 0:
                self._progress(number, arrival.at_s)
        now = self._run_until(float("inf"), now)
        return self._outcome(max(now - began, 1e-9))

    def _run_until(self, at_s: float, now: float) -> float:
        """Process all events before ``at_s``. Returns the time of the last one."""
        ends = self._ends
        while ends and ends[0][0] <= at_s:
            end, index = heappop(ends)
            replica = self._replicas[index]
            if replica.ends_at != end:
                continue  # a request arrived meanwhile, and they ended sooner
            now = end
            for request in replica.end():
                self._placement.ended(request.id)
            if self._fleet.routing == "prefix":
                self._hear_of(index, now)
            self._begin(index, now)
        return now

    def _begin(self, index: int, now: float) -> None:
        replica = self._replicas[index]
        replica.begin(now)
        if replica.ends_at is not None:
            heappush(self._ends, (replica.ends_at, index))

    def _hear_of(self, index: int, now: float) -> None:
        replica = self._replicas[index]
        for request in replica.begun:
            self._placement.begun(request.id)
        report = replica.report(now)
        if report is not None:
            self._placement.take_in(index, report)

    def _take(self, number: int, arrival: Arrival) -> None:
        request = new_request(number, arrival.prompt, arrival.num_output)
        self._name_blocks(request, arrival.beginning)
        index = self._route(request)
        replica = self._replicas[index]
        before = replica.ends_at
        try:
            replica.submit(request, arrival.at_s)
        except InvalidRequestError:
            self._num_refused += 1
            self._placement.ended(request.id)
            return
        if before is None:
            self._begin(index, arrival.at_s)
        elif replica.ends_at is not None and replica.ends_at < before:
            heappush(self._ends, (replica.ends_at, index))

    def _name_blocks(self, request: Request, beginning: Beginning | None) -> None:
        """Compute the digests as the replicas' schedulers would, but those of shared beginnings only once."""
        if not self._fleet.sizes.enable_prefix_caching:
            return
        if beginning is not None:
            known = self._beginnings.setdefault(beginning.number, [])
            self._pool.extend_digests(known, beginning.tokens, None)
            request.digests += known
        self._pool.extend_digests(request.digests, request.tokens, None)

    def _route(self, request: Request) -> int:
        fleet = self._fleet
        if fleet.routing == "prefix":
            digests = request.digests[: (request.num_prompt - 1) // fleet.sizes.block_size]
            index = cast(int, self._placement.best(digests, request.num_prompt))
            self._placement.sent(request.id, index, digests, request.num_prompt)
            return index
        if fleet.routing == "round-robin":
            self._turn += 1
            return self._turn % fleet.num_replicas
        first, second = (self._rng.randrange(fleet.num_replicas) for _ in range(2))
        fewer = self._replicas[second].num_open < self._replicas[first].num_open
        return second if fleet.routing == "load" and fewer else first

    def _outcome(self, span_s: float) -> SimulationOutcome:
        replicas = self._replicas
        return SimulationOutcome(
            self._record, span_s, self._num_refused,
            sum(each.scheduler.num_prefix_queries for each in replicas),
            sum(each.scheduler.num_prefix_hits for each in replicas),
            sum(each.scheduler.num_preemptions for each in replicas),
            sum(each.num_steps for each in replicas),
            tuple(each.busy_s / span_s for each in replicas),
        )  # fmt: skip

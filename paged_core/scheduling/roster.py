"""Roster: who waits, who runs, and who will fork from whom. Each request that has not ended is in one place.

This file knows the order of requests and nothing of tokens, blocks or budgets.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core.scheduling.params import InvalidRequestError
from paged_core.scheduling.policies import SchedulingPolicy
from paged_core.scheduling.request import Request, RequestStatus


class Roster:
    """Requests between their arrival and their end, in the order of a policy."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self.waiting: list[Request] = []  # sorted by policy; of rows with one prompt only the first
        self.running: list[Request] = []  # sorted by policy
        self.loading: list[Request] = []  # sorted by policy: they run as soon as their blocks have come
        self._policy = policy
        self._pending_forks: dict[Request, list[Request]] = {}  # rows that will fork from a request's prompt
        self._num_arrivals = 0
        self._anyone_ended = False  # who is still in a list
        self._kind: str | None = None  # what the policy's keys are

    @property
    def num_seats(self) -> int:
        """Rows that run, or will as soon as their blocks have come, or one of these has computed their prompt."""
        forks = (
            len(rows) for leader, rows in self._pending_forks.items() if leader.status is not RequestStatus.WAITING
        )
        return len(self.running) + len(self.loading) + sum(forks)

    def arrive(self, siblings_of: Mapping[Request, list[Request]]) -> None:
        """Queue the requests of one group: those that will compute a prompt, and who will fork from each.

        Raises:
            InvalidRequestError: the policy's key for the group can't be compared with the others'.
            BaseException: what the policy raises. Nobody was queued.
        """
        first, *_ = siblings_of
        for leader, siblings in siblings_of.items():
            for request in (leader, *siblings):
                request.arrival = self._num_arrivals
        key = self._policy.key(first.group.members[0])
        self._check_comparable(key)
        self._num_arrivals += 1
        for leader, siblings in siblings_of.items():
            for request in (leader, *siblings):
                # Requests that came together stay together, whatever the policy says of each.
                request.rank = (key, request.arrival, request.index)
            self._wait(leader)
        for leader, siblings in siblings_of.items():
            for sibling in siblings:
                sibling.status = RequestStatus.PENDING_FORK
            if siblings:
                self._pending_forks[leader] = siblings

    def start(self, request: Request) -> None:
        """One that waits, or whose blocks have come."""
        (self.loading if request.status is RequestStatus.LOADING else self.waiting).remove(request)
        self._run(request)

    def load(self, request: Request) -> None:
        """One that waits has a seat from now on, and waits for blocks only."""
        self.waiting.remove(request)
        request.status = RequestStatus.LOADING
        insort(self.loading, request, key=_rank)

    def send_back(self, request: Request) -> None:
        """One that runs, or loads, waits for its turn again."""
        (self.loading if request.status is RequestStatus.LOADING else self.running).remove(request)
        self._wait(request)

    def samples(self, leader: Request) -> tuple[Request, ...]:
        """The rows that sample when this one has computed its tokens: itself, and who then forks from it."""
        return (leader, *self._pending_forks.get(leader, ())) if self._pending_forks else (leader,)

    def take_forks(self, leader: Request) -> list[Request]:
        """The rows that were to fork from it: they run from now on."""
        siblings = self._pending_forks.pop(leader)
        for sibling in siblings:
            self._run(sibling)
        return siblings

    def end(self, request: Request) -> Request | None:
        """It has ended, and leaves its list with the next ``drop_finished``. Returns who waits or runs in its place:
        the first of those that were to fork from it; the others fork from that one."""
        first_fork = None
        if request.status is RequestStatus.PENDING_FORK:
            leader = next(row for row in request.group.members if request in self._pending_forks.get(row, ()))
            self._pending_forks[leader].remove(request)
            if not self._pending_forks[leader]:
                del self._pending_forks[leader]
        elif request in self._pending_forks:
            first_fork, *siblings = self._pending_forks.pop(request)
            if siblings:
                self._pending_forks[first_fork] = siblings
            if request.status is RequestStatus.RUNNING:
                self._run(first_fork)
            else:
                self._wait(first_fork)
        request.status = RequestStatus.FINISHED
        self._anyone_ended = True
        return first_fork

    def drop_finished(self) -> None:
        if not self._anyone_ended:
            return
        self._anyone_ended = False
        self.running = [request for request in self.running if not request.finished]
        if any(request.finished for request in self.waiting):
            self.waiting = [request for request in self.waiting if not request.finished]

    def check(self) -> None:
        assert all(r.status is RequestStatus.RUNNING for r in self.running)
        assert all(r.status is RequestStatus.WAITING and not r.block_table for r in self.waiting)
        assert all(r.status is RequestStatus.PENDING_FORK for rows in self._pending_forks.values() for r in rows)
        assert all(rows and not leader.finished for leader, rows in self._pending_forks.items())
        assert all(r.status is RequestStatus.LOADING and not r.held for r in self.loading)
        assert self.running == sorted(self.running, key=_rank)
        assert self.loading == sorted(self.loading, key=_rank)
        assert self.waiting == sorted(self.waiting, key=_rank)

    def _wait(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_rank)

    def _run(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=_rank)

    def _check_comparable(self, key: Any) -> None:
        """Once it is in a list, each comparison with it is somebody else's."""
        kind = _kind(key)
        if self._kind not in (None, kind):
            raise InvalidRequestError(
                f"the scheduling policy's key is {key!r}; those of other requests are {self._kind}"
            )
        try:
            others = (
                request.rank[0] for request in (*self.waiting, *self.running, *self.loading, *self._pending_forks)
            )
            if kind in _ORDERED or all(_in_order(key, other) for other in (key, *others)):
                self._kind = kind
                return
            why = "it is neither equal, smaller nor larger"
        except Exception as error:
            why = repr(error)
        raise InvalidRequestError(f"the scheduling policy's key {key!r} can't be compared with others: {why}")


_ORDERED = ("numbers", "strings")  # kinds whose every two keys can be compared


def _kind(key: Any) -> str:
    if isinstance(key, str):
        return "strings"
    if isinstance(key, (int, float)) and key == key:
        return "numbers"
    return f"of {type(key).__name__}"


def _in_order(a: Any, b: Any) -> bool:
    return bool(a == b) or bool(a < b) != bool(b < a)


def _rank(request: Request) -> tuple[Any, int, int]:
    return request.rank


def by_prompt(requests: Sequence[Request]) -> dict[Request, list[Request]]:
    """The first request of each prompt, and the others of that prompt: they can fork from it."""
    first_of: dict[tuple[int, ...], Request] = {}
    siblings_of: dict[Request, list[Request]] = {}
    for request in requests:
        first = first_of.setdefault(tuple(request.tokens), request)
        if first is request:
            siblings_of[first] = []
        else:
            siblings_of[first].append(request)
    return siblings_of


def lockstep_rows(request: Request) -> list[Request]:
    """The rows of its group that are there to be computed; pending forks are not."""
    not_there = (RequestStatus.FINISHED, RequestStatus.PENDING_FORK)
    return [row for row in request.group.members if row.status not in not_there]

"""Roster: the waiting, the running and the loading requests, and pending forks. A request that has not ended is in one
of them.

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
        self.waiting: list[Request] = []  # sorted by policy; of several rows with one prompt, only the first
        self.running: list[Request] = []  # sorted by policy
        self.loading: list[Request] = []  # sorted by policy; they run as soon as their blocks have been loaded
        self._policy = policy
        self._pending_forks: dict[Request, list[Request]] = {}  # rows that will fork from the request
        self._num_arrivals = 0
        self._anyone_ended = False  # whether a list still holds requests that have ended
        self._kind: str | None = None  # of the policy's keys: "numbers", "strings" or a type's name

    @property
    def num_seats(self) -> int:
        """The number of rows that run, or will run without further admission: loading rows, and forks of running or
        loading ones."""
        forks = (
            len(rows) for leader, rows in self._pending_forks.items() if leader.status is not RequestStatus.WAITING
        )
        return len(self.running) + len(self.loading) + sum(forks)

    def arrive(self, siblings_of: Mapping[Request, list[Request]]) -> None:
        """Queue the requests of one group: for each distinct prompt the request that computes it, with those that fork
        from it.

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
                # Requests that came together stay together, whatever key the policy gives each of them.
                request.rank = (key, request.arrival, request.index)
            self._wait(leader)
        for leader, siblings in siblings_of.items():
            for sibling in siblings:
                sibling.status = RequestStatus.PENDING_FORK
            if siblings:
                self._pending_forks[leader] = siblings

    def start(self, request: Request) -> None:
        """Let a request run that waits, or whose blocks have been loaded."""
        (self.loading if request.status is RequestStatus.LOADING else self.waiting).remove(request)
        self._run(request)

    def load(self, request: Request) -> None:
        """Give a seat to a waiting request, which then waits only for its blocks."""
        self.waiting.remove(request)
        request.status = RequestStatus.LOADING
        insort(self.loading, request, key=_rank)

    def send_back(self, request: Request) -> None:
        """Let a running or loading request wait for its turn again."""
        (self.loading if request.status is RequestStatus.LOADING else self.running).remove(request)
        self._wait(request)

    def samples(self, leader: Request) -> tuple[Request, ...]:
        """Return the rows that sample once this one has computed its tokens: itself, and those that fork from it."""
        return (leader, *self._pending_forks.get(leader, ())) if self._pending_forks else (leader,)

    def take_forks(self, leader: Request) -> list[Request]:
        """Return the rows that were to fork from it, and let them run."""
        siblings = self._pending_forks.pop(leader)
        for sibling in siblings:
            self._run(sibling)
        return siblings

    def end(self, request: Request) -> Request | None:
        """Mark a request as ended; ``drop_finished`` removes it from its list. Returns the request that takes its
        place: the first of those that were to fork from it. The others fork from that one."""
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
        """Refuse a key that can't be compared with the others, before later comparisons fail in another request's
        call."""
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


_ORDERED = ("numbers", "strings")  # kinds of which any two keys can be compared


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
    """Map the first request of each prompt to the other requests of that prompt, which can fork from it."""
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
    """Return the rows of its group that can be computed now, without pending forks."""
    not_there = (RequestStatus.FINISHED, RequestStatus.PENDING_FORK)
    return [row for row in request.group.members if row.status not in not_there]

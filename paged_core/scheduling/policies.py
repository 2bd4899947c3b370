"""The order in which requests are served."""

from __future__ import annotations

from typing import Any, Protocol

from paged_core.scheduling.request import Request


class SchedulingPolicy(Protocol):
    """A policy orders requests by their keys."""

    def key(self, request: Request) -> Any:
        """Return a request's key. Requests with smaller keys run first, those with the largest are preempted first. Of
        equal keys, the request that came first runs first.

        This is called once, when the request is added; an exception refuses the request. All keys must be numbers, or
        all strings, or all of one type whose values can be compared.
        """
        ...


class Fcfs:
    """First come, first served."""

    def key(self, request: Request) -> int:
        return request.arrival


class Priority:
    """Lower ``SamplingParams.priority`` first, then first come, first served."""

    def key(self, request: Request) -> int:
        return request.params.priority

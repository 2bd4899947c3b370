"""Which request goes first."""

from __future__ import annotations

from typing import Any, Protocol

from paged_core.scheduling.request import Request


class SchedulingPolicy(Protocol):
    """An order of requests."""

    def key(self, request: Request) -> Any:
        """Smaller runs first; the largest is preempted first. Ties go to who came first.

        Asked once, when the request is added; an exception refuses it. Keys are all numbers, or strings, or of one type
        whose values can be compared.
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

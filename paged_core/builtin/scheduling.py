"""The two scheduling policies that come with the core."""

from __future__ import annotations

from paged_core.hookspecs import hookimpl
from paged_core.scheduling.policies import Fcfs, Priority, SchedulingPolicy


@hookimpl
def create_scheduling_policy(name: str) -> SchedulingPolicy | None:
    policies: dict[str, type[Fcfs] | type[Priority]] = {"fcfs": Fcfs, "priority": Priority}
    return policies[name]() if name in policies else None

"""Lane: one engine of a worker, and what requests for it are read with. A worker has one, or one for each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paged_core import AsyncEngine, hookimpl
from paged_serving import PrometheusMetrics
from paged_torchserve.target import Target


class Admissions:
    """An engine's observer that tells which requests it has taken in, by its own thread."""

    def __init__(self) -> None:
        self.tell: Callable[[Admissions, str], None] | None = None

    @hookimpl
    def on_request_added(self, request: Any) -> None:
        if self.tell is not None:
            self.tell(self, request.id)


@dataclass(frozen=True)
class LaneObservers:
    """What looks on at one engine."""

    admissions: Admissions
    metrics: PrometheusMetrics

    @property
    def plugins(self) -> list[Any]:
        return [self.admissions, self.metrics]


@dataclass(frozen=True)
class Lane:
    engine: AsyncEngine
    target: Target
    observers: LaneObservers


def emptiest(lanes: Sequence[Lane], taken: Iterable[Lane]) -> Lane:
    """The lane that stands least often in ``taken``; of several, the first."""
    names = [id(lane) for lane in taken]
    return min(lanes, key=lambda lane: names.count(id(lane)))

"""Lane: one engine of a worker, with the tokenizer and grammars of its requests. A worker has one, or one for each
GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paged_core import AsyncEngine, hookimpl
from paged_serving import PrometheusMetrics
from paged_torchserve.target import Target


class Admissions:
    """An observer that reports, in the engine's thread, which requests the engine has accepted."""

    def __init__(self) -> None:
        self.tell: Callable[[Admissions, str], None] | None = None

    @hookimpl
    def on_request_added(self, request: Any) -> None:
        if self.tell is not None:
            self.tell(self, request.id)


@dataclass(frozen=True)
class LaneObservers:
    """The observers of one engine."""

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
    """The lane that occurs least often in ``taken``; of several, the first."""
    names = [id(lane) for lane in taken]
    return min(lanes, key=lambda lane: names.count(id(lane)))

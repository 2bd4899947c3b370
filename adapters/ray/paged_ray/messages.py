"""Messages between the ingress and the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RoutedCall:
    """One HTTP request on its way to a replica. The router reads the first three fields."""

    id: str  # of this attempt
    digests: Sequence[int]  # of its prompt's leading blocks; empty: the least busy replica gets it
    num_tokens: int  # of its prompt; 0: unknown
    scope: dict[str, Any]  # ASGI's, as far as it can be sent
    body: bytes


class EngineFacts(NamedTuple):
    """The facts of a replica's engine that reading a request needs; the same for all replicas."""

    spec: Any  # paged_core.ModelSpec
    sizes: Any  # paged_core.EngineSizes
    config: Any  # paged_core.EngineConfig
    tokenizer: Any

"""The Placement of a deployment in this process, which the ingress and Ray's router share. It is not in the router's
module, because Ray sends that module to processes as a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paged_ray.placement import Placement

_DEFAULT_BLOCK = 16  # until a replica has told how large its blocks are
_lock = threading.Lock()
_placements: dict[str, Placement] = {}


@contextmanager
def placement(deployment: Any) -> Iterator[Placement]:
    """This process's Placement for a deployment (Ray's DeploymentID), for this thread alone."""
    with _lock:
        yield _placements.setdefault(str(deployment), Placement(_DEFAULT_BLOCK))

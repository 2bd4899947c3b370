"""Names of parametrised cases that are the same in every process, so that several processes may share a run."""

from __future__ import annotations

import re
from typing import Any


def told(value: Any) -> str:
    """Return ``str(value)`` without addresses: ``<function <lambda> at 0x7f...>`` becomes ``<function <lambda>>``."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))

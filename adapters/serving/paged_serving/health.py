"""Whether an engine works or is stuck."""

from __future__ import annotations

from paged_core import AsyncEngine


def trouble(engine: AsyncEngine, max_step_s: float, limit: str) -> str | None:
    """The trouble of ``engine``, or None: it has failed, or a step takes longer than ``max_step_s``, an option that the
    operator knows as ``limit``."""
    if not engine.alive:
        told = engine.engine.trouble
        return "the engine has failed" if told is None else f"the engine has failed: {told}"
    busy_s = engine.busy_s
    if busy_s > max_step_s:
        return f"a step of the engine has not ended in {busy_s:.1f} s; {limit} is {max_step_s:g} s"
    return None

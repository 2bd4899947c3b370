"""Whether an engine does its work."""

from __future__ import annotations

from paged_core import AsyncEngine


def trouble(engine: AsyncEngine, max_step_s: float, limit: str) -> str | None:
    """What is wrong with ``engine``, if anything is: it has failed, or one of its steps takes longer than
    ``max_step_s``, which is what the operator knows as ``limit``."""
    if not engine.alive:
        told = engine.engine.trouble
        return "the engine has failed" if told is None else f"the engine has failed: {told}"
    busy_s = engine.busy_s
    if busy_s > max_step_s:
        return f"a step of the engine has not ended in {busy_s:.1f} s; {limit} is {max_step_s:g} s"
    return None

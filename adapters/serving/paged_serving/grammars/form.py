"""The layout of structured output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JsonForm:
    """How JSON is set. The names are vLLM's."""

    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None  # an expression for what may stand between JSON's tokens

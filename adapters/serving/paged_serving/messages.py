"""Answers as bytes: JSON, and server-sent events of it."""

from __future__ import annotations

import json
from typing import Any

LAST_EVENT = b"data: [DONE]\n\n"  # of OpenAI's streams


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON. A lone surrogate, quoted from a request, is written as JSON's escape."""
    return json_text(value).encode(errors="backslashreplace")


def event_bytes(value: Any) -> bytes:
    return as_event(json_bytes(value))


def as_event(told: bytes) -> bytes:
    """JSON in one line as an event."""
    return b"data: " + told + b"\n\n"

"""The input of a response as items: GET /v1/responses/ID/input_items (OpenAI's)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paged_serving.conversation.turns import Turn
from paged_serving.protocol.parsing import ProtocolError, refuse, shortened

_MOST, _USUAL = 100, 20  # items of one page
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def items_page(turns: Sequence[Turn], response_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of ``turns``, the newest first unless ``query`` says ``order=asc``; ``after`` is the id of the item that
    the page goes on from, ``limit`` the most items.

    Raises:
        ProtocolError: ``query`` asks for no page.
    """
    limit, order, after = query.get("limit", str(_USUAL)), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= _MOST):
        refuse("limit", f"is {shortened(limit)!r}; it must be an integer from 1 to {_MOST}")
    if order not in ("asc", "desc"):
        refuse("order", f'is {shortened(order)!r}; it must be "asc" or "desc"')
    items = _with_ids(turns, response_id)
    if order == "desc":
        items.reverse()
    start = 0 if after is None else _place(items, after) + 1
    page = items[start : start + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(items),
    }


def _place(items: Sequence[Mapping[str, Any]], after: str) -> int:
    for place, item in enumerate(items):
        if item["id"] == after:
            return place
    raise ProtocolError(f"after is {shortened(after)!r}, which is no item of this response", "after")


def _with_ids(turns: Sequence[Turn], response_id: str) -> list[dict[str, Any]]:
    """The same ids each time."""
    stem = response_id.removeprefix("resp_")
    items = [item for turn in turns for item in _items(turn)]
    return [{"id": f"{_PREFIXES[item['type']]}_{stem}_{place}", **item} for place, item in enumerate(items)]


def _items(turn: Turn) -> Iterator[dict[str, Any]]:
    done = {"status": "completed"}
    texts = [turn.content] if isinstance(turn.content, str) else list(turn.content or ())
    if turn.reasoning:
        yield {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": turn.reasoning}]}
    if turn.role == "tool":
        yield {"type": "function_call_output", "call_id": turn.tool_call_id, "output": "".join(texts), **done}
    elif turn.content is not None:
        yield {"type": "message", "role": turn.role, "content": [_part(turn.role, text) for text in texts], **done}
    for call in turn.tool_calls:
        yield {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments, **done}


def _part(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}

"""Stored responses, which later ones can continue: the newest ones, within limits. Knows only their ids."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from paged_serving.conversation.turns import Turn
from paged_serving.messages import json_text
from paged_serving.protocol.parsing import ProtocolError, shortened

_RESPONSE = "resp_"  # what its ids begin with
_MAX_CHARACTERS = 64 * 2**20


class _KeptResponse(NamedTuple):
    turns: Sequence[Turn]
    response: Mapping[str, Any]  # as it was answered
    size: int  # characters


class ResponseStore:
    """``max_responses``: kept at most; 64 Mi characters of them, too. Callable from any thread."""

    def __init__(self, max_responses: int) -> None:
        self._max = max_responses
        self._lock = threading.Lock()  # guards what follows
        self._kept: OrderedDict[str, _KeptResponse] = OrderedDict()  # used last, last
        self._size = 0

    def put(self, response_id: str, turns: Sequence[Turn], response: Mapping[str, Any]) -> None:
        """A response, and the conversation up to it, its own answer included and instructions left out. Ids must be
        unguessable, because whoever has one may read the conversation."""
        kept = _KeptResponse(turns, response, sum(map(_size, turns)) + len(json_text(response)))
        with self._lock:
            self._kept[response_id] = kept
            self._size += kept.size
            while self._kept and (len(self._kept) > self._max or self._size > _MAX_CHARACTERS):
                _, gone = self._kept.popitem(last=False)
                self._size -= gone.size

    def turns(self, response_id: str) -> Sequence[Turn]:
        """
        Raises:
            ProtocolError: it isn't kept, or not any more.
        """
        kept = self._used(response_id)
        if kept is not None:
            return kept.turns
        told = f"{self._missing(response_id)}. Send the whole input instead"
        raise ProtocolError(
            f"previous_response_id: {told}", "previous_response_id", status=404, code="previous_response_not_found"
        )

    def response(self, response_id: str) -> Mapping[str, Any]:
        """
        Raises:
            ProtocolError: it isn't kept, or not any more.
        """
        return self._found(response_id).response

    def item(self, item_id: str, field: str) -> Mapping[str, Any]:
        """An item that a response has told. ``field``: of the body, that asks for it.

        Raises:
            ProtocolError: its response isn't kept, or not any more.
        """
        kept = self._used(response_of(item_id))
        for item in () if kept is None else kept.response["output"]:
            if item["id"] == item_id:
                found: Mapping[str, Any] = item
                return found
        told = f"{field}: {self._missing(item_id)}. Send the item itself instead"
        raise ProtocolError(told, field, status=404, code="item_not_found")

    def asked(self, response_id: str) -> Sequence[Turn]:
        """The conversation that the response answers, without instructions. Raises ProtocolError as ``response``."""
        return self._found(response_id).turns[:-1]

    def delete(self, response_id: str) -> None:
        """Raises ProtocolError as ``response``."""
        with self._lock:
            gone = self._kept.pop(response_id, None)
            if gone is None:
                raise self._not_found(response_id)
            self._size -= gone.size

    def _found(self, response_id: str) -> _KeptResponse:
        kept = self._used(response_id)
        if kept is None:
            raise self._not_found(response_id)
        return kept

    def _used(self, response_id: str) -> _KeptResponse | None:
        with self._lock:
            kept = self._kept.get(response_id)
            if kept is not None:
                self._kept.move_to_end(response_id)
            return kept

    def _not_found(self, response_id: str) -> ProtocolError:
        told = f"response_id: {self._missing(response_id)}"
        return ProtocolError(told, "response_id", status=404, code="response_not_found")

    def _missing(self, response_id: str) -> str:
        return (
            f"{shortened(response_id)!r} is not kept here; the {self._max} newest responses are, in memory "
            "(--max-stored-responses), and none that said store: false"
        )


def item_id(prefix: str, response_id: str, place: int) -> str:
    """Of the item at ``place`` of a response's output. Its response can be told from it."""
    return f"{prefix}_{response_id.removeprefix(_RESPONSE)}_o{place}"


def response_of(item_id: str) -> str:
    """The id of the response that has told the item; of what is no item's id, anything."""
    return _RESPONSE + item_id.partition("_")[2].partition("_")[0]


def _size(turn: Turn) -> int:
    texts = [turn.content] if isinstance(turn.content, str) else list(turn.content or ())
    return sum(map(len, texts)) + len(turn.reasoning or "") + sum(len(call.arguments) for call in turn.tool_calls) + 64

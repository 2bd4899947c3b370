"""Responses that later ones go on from: the newest, within bounds. Knows no protocol but their ids."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from paged_serving.conversation.turns import Turn
from paged_serving.protocol.parsing import ProtocolError, shortened

_MAX_CHARACTERS = 64 * 2**20


class _Kept(NamedTuple):
    turns: Sequence[Turn]
    size: int  # characters


class ResponseStore:
    """``max_responses``: kept at most; 64 Mi characters of them, too. Callable from any thread."""

    def __init__(self, max_responses: int) -> None:
        self._max = max_responses
        self._lock = threading.Lock()  # guards what follows
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # used last, last
        self._size = 0

    def put(self, response_id: str, turns: Sequence[Turn]) -> None:
        """The conversation up to that response, without instructions. The ids are not to be guessed: who has one may
        read on."""
        kept = _Kept(turns, sum(map(_size, turns)))
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
        with self._lock:
            kept = self._kept.get(response_id)
            if kept is not None:
                self._kept.move_to_end(response_id)
                return kept.turns
        told = (
            f"previous_response_id: {shortened(response_id)!r} is not kept here; the {self._max} newest are, in memory "
            "(--max-stored-responses), and none that said store: false. Send the whole input instead"
        )
        raise ProtocolError(told, "previous_response_id", status=404, code="previous_response_not_found")


def _size(turn: Turn) -> int:
    texts = [turn.content] if isinstance(turn.content, str) else list(turn.content or ())
    return sum(map(len, texts)) + len(turn.reasoning or "") + sum(len(call.arguments) for call in turn.tool_calls) + 64

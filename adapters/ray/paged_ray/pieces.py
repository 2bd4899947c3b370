"""PieceCodec: the token ids of the beginnings of texts, from pieces of earlier texts. A router reads the same
beginnings again and again: a system prompt, or the earlier turns of a conversation. A part that is new to it is in no
replica's cache either, so it reads only a little of that part; later texts with the same beginning find more of it
known.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from paged_core import TextCodec

_PIECE = 512  # characters, at least
_MOST_NEW = 4  # most new pieces of a text that are encoded
_KEPT = 8192  # pieces: about 20 MB with their token ids
_CUT = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")  # between two words, where most tokenizers join nothing
_TRIAL = "Once 12 men went to sea, they said. It's a long way home from here\nand who knows\n\n the  way? Nobody does"


class PieceCodec(TextCodec):
    """A TextCodec for the beginnings of prompts; it may leave out the rest. It first tests whether its tokenizer
    encodes pieces as it encodes the whole text. If not, it encodes whole texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._known: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()  # least recently used first
        self._known_lock = threading.Lock()
        self._thread = threading.local()
        self._can_be_cut = {special: self._try(special) for special in (False, True)}

    def take_unread(self) -> int:
        """About how many tokens this thread's texts left out since the last call."""
        unread, self._thread.unread = getattr(self._thread, "unread", 0), 0
        return unread

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids that the text begins with, up to its fourth new piece."""
        if not self._can_be_cut[add_special_tokens]:
            return super().encode(text, add_special_tokens)
        found: list[int] = []
        num_new, read = 0, 0
        for piece, is_last in _pieces(text):
            special = add_special_tokens and not found
            known = None if is_last else self._recall(piece, special)
            if known is None:
                if num_new == _MOST_NEW:
                    self._thread.unread = getattr(self._thread, "unread", 0) + len(found) * (len(text) - read) // read
                    break
                num_new += 1
                known = super().encode(piece, special)
                if not is_last:
                    self._keep(piece, special, known)
            found += known
            read += len(piece)
        return found

    def _recall(self, piece: str, special: bool) -> list[int] | None:
        with self._known_lock:
            ids = self._known.get((piece, special))
            if ids is not None:
                self._known.move_to_end((piece, special))
            return ids

    def _keep(self, piece: str, special: bool, ids: list[int]) -> None:
        with self._known_lock:
            self._known[piece, special] = ids
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)

    def _try(self, add_special_tokens: bool) -> bool:
        if self.tokenizer is None:
            return False
        whole = super().encode(_TRIAL, add_special_tokens)
        return all(
            super(PieceCodec, self).encode(_TRIAL[: cut.start()], add_special_tokens)
            + super(PieceCodec, self).encode(_TRIAL[cut.start() :], False) == whole
            for cut in _CUT.finditer(_TRIAL)
        )  # fmt: skip


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(a piece, whether it is the last): the end of a piece depends only on the text before it, so that texts with the
    same beginning have the same pieces."""
    start = 0
    while (cut := _CUT.search(text, start + _PIECE)) is not None:
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True

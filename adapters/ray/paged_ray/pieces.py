"""PieceCodec: the token ids that texts begin with, made of pieces that others began with too.

Who routes requests reads the same beginnings again and again: a system prompt, or a conversation as far as it has come.
What is new to him no replica has in its cache either, so that he needs to read little of it: the next text that begins
like this one finds more of it known.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from paged_core import TextCodec

_PIECE = 512  # characters, at least
_MOST_NEW = 4  # pieces of a text that are read though they are new
_KEPT = 8192  # pieces: about 20 MB with their token ids
_CUT = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")  # between two words: tokenizers of most kinds join nothing there
_TRIAL = "Once 12 men went to sea, they said. It's a long way home from here\nand who knows\n\n the  way? Nobody does"


class PieceCodec(TextCodec):
    """A TextCodec for somebody who wants to know what prompts begin with. It may leave out how they go on.

    It tries at the beginning whether its tokenizer tells pieces as it tells the whole. If it doesn't, texts are encoded
    whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._known: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()  # the first used longest ago
        self._known_lock = threading.Lock()
        self._thread = threading.local()
        self._can_be_cut = {special: self._try(special) for special in (False, True)}

    def take_unread(self) -> int:
        """About how many tokens were left out of what this thread has encoded since it asked the last time."""
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
    """(a piece, whether it is the last): where they end depends on what is before only, so that texts which begin alike
    have the same pieces there."""
    start = 0
    while (cut := _CUT.search(text, start + _PIECE)) is not None:
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True

"""Token ids in, text out, a few tokens at a time. This file knows nothing of requests, threads or stop strings.

What has been shown never changes, and half a character is never shown. For every tokenizer whose text only grows when
tokens are added, the pieces put together are ``decode(all ids)``. One kind does not only grow: a byte fallback that
turns a whole run of bytes into U+FFFD when one of them is wrong, good bytes included. There we keep what was right
(and a U+FFFD that the model itself spelt in bytes, with more such bytes after it, may come out as several).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"  # what decoders put where bytes make no character, or no whole one yet


class Detokenizer(Protocol):
    """One row's ids turned into text as they come."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and wasn't before."""
        ...

    def flush(self) -> str:
        """The rest: no more ids will come."""
        ...


class ByteLevelDetokenizer:
    """For tokenizers whose tokens are strings of bytes: exact, and without asking the tokenizer again."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._utf8.decode(b"".join([pieces[token] for token in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class BytePieces(dict[int, bytes]):
    """Token id -> the bytes it stands for, learnt as tokens are met; shared by all rows of one tokenizer."""

    def __init__(self, tokenizer: Any, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._decode = decode

    def __missing__(self, token: int) -> bytes:
        text = self._decode([token])
        piece = text.encode() if REPLACEMENT not in text else self._bytes_of(token)
        self[token] = piece
        return piece

    def _bytes_of(self, token: int) -> bytes:
        characters: str = self._tokenizer.convert_ids_to_tokens(token)
        try:
            return bytes(_BYTE_OF[character] for character in characters)
        except KeyError:  # an added token, spelt as it is
            return characters.encode()


class WindowDetokenizer:
    """For any tokenizer that has a ``decode``: decodes a short window again for each token.

    The window keeps some shown tokens before the new ones, because decoders treat the first token unlike others (a
    leading space). Up to three U+FFFD at the end may be a character under way (four bytes, one a token) and wait.
    """

    _KEPT = 8  # tokens that stay when the window is cut
    _FULL = 16  # tokens at which it is cut
    _HOPELESS = 64  # tokens that can only be garbage: shown as they are

    def __init__(self, decode: Callable[[Sequence[int]], str], is_inert: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_inert = is_inert
        self._ids: list[int] = []
        self._shown = ""  # of decode(_ids), what the caller has
        self._num_settled = 0  # leading ids whose text has been shown in whole

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token) for token in token_ids if not self._is_inert(token)])

    def flush(self) -> str:
        text = self._decode(self._ids)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else self._decode(self._pending)
        self._ids, self._shown, self._num_settled = [], "", 0
        return rest

    @property
    def _pending(self) -> list[int]:
        return self._ids[self._num_settled :]

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.startswith(self._shown):
            if text.endswith(REPLACEMENT) and len(self._pending) < 4:
                return ""  # a run of bytes that lacks its last ones looks wrong as a whole; they may come
            self._ids, self._shown, self._num_settled = self._pending, "", 0
            text = self._decode(self._ids)
        if text == self._shown:
            self._num_settled = len(self._ids)
        elif len(self._pending) < 4 and not text[len(self._shown) :].strip(REPLACEMENT):
            return ""
        certain = _without_unfinished_character(text)
        new = certain[len(self._shown) :]
        if new:
            self._shown = certain
            if certain == text:
                self._num_settled = len(self._ids)
        return new + self._cut(text)

    def _cut(self, text: str) -> str:
        """Shorten a full window, so that the work for a token doesn't grow; returns text that had to be let go."""
        if len(self._ids) < self._FULL:
            return ""
        tail = self._ids[-self._KEPT :]
        tail_text = self._decode(tail)
        waiting = text[len(self._shown) :]
        released = ""
        if len(tail_text) <= len(waiting) or not text.endswith(tail_text):
            if len(self._ids) < self._HOPELESS:
                return ""  # the cut would go through a character; a token later it won't
            if not tail_text.endswith(waiting):
                released, waiting = waiting, ""
        self._num_settled = max(0, self._num_settled - (len(self._ids) - len(tail)))
        self._ids = tail
        self._shown = tail_text[: len(tail_text) - len(waiting)]
        return released


class InertTokens(dict[int, bool]):
    """Token id -> whether it never adds to the text: skipped special tokens, ids the tokenizer doesn't know."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token: int) -> bool:
        # Twice, because a lone leading space is taken off a text's beginning.
        inert = self[token] = self._decode([token, token]) == ""
        return inert


def is_byte_level(tokenizer: Any) -> bool:
    """Whether this is a Hugging Face fast tokenizer whose decoder joins bytes and does nothing else."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return type(decoder).__name__ == "ByteLevel" and tokenizer.convert_ids_to_tokens is not None


def _without_unfinished_character(text: str) -> str:
    for _ in range(3):
        text = text.removesuffix(REPLACEMENT)
    return text


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the rest begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(0x100 + order): byte for order, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_of_characters()

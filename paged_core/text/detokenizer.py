"""Detokenizers: turn token ids into text, a few at a time. This file knows nothing of requests, threads or stop
strings.

Text that was returned never changes, and half a character is never returned. For every tokenizer whose text only grows
when tokens are added, the pieces joined are ``decode(all ids)``. One kind does not only grow: a byte fallback that
turns a whole run of bytes into U+FFFD if one of them is wrong, valid bytes included. There the valid characters already
returned stay (and a U+FFFD that the model itself spelt in bytes, followed by more such bytes, may become several).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"  # what decoders return for bytes that are no character, or not yet a whole one


class Detokenizer(Protocol):
    """Turns one row's ids into text as they come."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that has become certain with these ids."""
        ...

    def flush(self) -> str:
        """Return the rest, because no more ids will come."""
        ...


class ByteLevelDetokenizer:
    """For tokenizers whose tokens are strings of bytes. It is exact, and does not call the tokenizer again."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._utf8.decode(b"".join([pieces[token] for token in token_ids]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class BytePieces(dict[int, bytes]):
    """Token id -> the bytes that it stands for, filled in when tokens are first met, and shared by all rows of one
    tokenizer."""

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
        except KeyError:  # an added token, which is spelt as it is
            return characters.encode()


class WindowDetokenizer:
    """For any tokenizer with a ``decode``. It decodes a short window again for each token.

    The window keeps some returned tokens before the new ones, because decoders treat the first token differently (they
    strip a leading space). Up to three U+FFFD at the end may be an unfinished character (four bytes, one per token),
    and are held back.
    """

    _KEPT = 8  # tokens that stay when the window is shortened
    _FULL = 16  # tokens at which it is shortened
    _HOPELESS = 64  # tokens after which text that never becomes certain is returned as it is

    def __init__(self, decode: Callable[[Sequence[int]], str], is_inert: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_inert = is_inert
        self._ids: list[int] = []
        self._shown = ""  # the part of decode(_ids) that was returned
        self._num_settled = 0  # leading ids whose whole text was returned

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
                return ""  # an unfinished run of bytes looks wrong as a whole; its last bytes may still come
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
        """Shorten a full window, so that the work per token doesn't grow. Returns text that can't be held back any
        longer."""
        if len(self._ids) < self._FULL:
            return ""
        tail = self._ids[-self._KEPT :]
        tail_text = self._decode(tail)
        waiting = text[len(self._shown) :]
        released = ""
        if len(tail_text) <= len(waiting) or not text.endswith(tail_text):
            if len(self._ids) < self._HOPELESS:
                return ""  # the cut would go through a character; at a later token it won't
            if not tail_text.endswith(waiting):
                released, waiting = waiting, ""
        self._num_settled = max(0, self._num_settled - (len(self._ids) - len(tail)))
        self._ids = tail
        self._shown = tail_text[: len(tail_text) - len(waiting)]
        return released


class InertTokens(dict[int, bool]):
    """Token id -> whether it never adds text: skipped special tokens, and ids that the tokenizer doesn't know."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token: int) -> bool:
        # The token is decoded twice in a row, because decoders strip a text's leading space.
        inert = self[token] = self._decode([token, token]) == ""
        return inert


def is_byte_level(tokenizer: Any) -> bool:
    """Return whether this is a Hugging Face fast tokenizer whose decoder does nothing but join bytes."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return type(decoder).__name__ == "ByteLevel" and tokenizer.convert_ids_to_tokens is not None


def _without_unfinished_character(text: str) -> str:
    for _ in range(3):
        text = text.removesuffix(REPLACEMENT)
    return text


def _byte_of_characters() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others begin at
    U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(0x100 + order): byte for order, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_of_characters()

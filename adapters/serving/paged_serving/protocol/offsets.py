"""``text_offset`` of completions: where tokens begin in the returned text, in characters. A token's offset is the
length of the text before it. Tokens of one character share its offset, and a token that adds nothing has the offset of
the next one. The pieces between successive offsets make the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from paged_core import Prompt, TextCodec, TokenLogprobs
from paged_serving.protocol.tokens import TokenTexts


class Placed:
    """One choice's tokens, with their entries and their places in its text, as the text comes out.

    Text that may be the beginning of a stop string is held back, and so are tokens that begin inside it, because their
    offsets depend on it: tokens that a stop string cuts off have the offset of the text's end.
    """

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._detokenizer = codec.detokenizer(skip_special_tokens)
        self._place = 0  # of the next token
        self._told = 0  # characters
        self._held: list[tuple[int, TokenLogprobs, int]] = []

    def echo(self, text: str) -> None:
        """The choice's text begins with this."""
        self._place = self._told = len(text)

    def push(
        self, text: str, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], *, ended: bool
    ) -> list[tuple[int, TokenLogprobs, int]]:
        """``text`` is told now, and ``token_ids`` are new -> tokens whose places are certain, with their entries."""
        self._told += len(text)
        for token, entry in zip(token_ids, entries, strict=True):
            self._held.append((token, entry, self._place))
            self._place += len(self._detokenizer.push([token]))
        certain = [(token, entry, min(place, self._told)) for token, entry, place in self._held
                   if ended or place <= self._told]  # fmt: skip
        del self._held[: len(certain)]  # places only grow
        return certain


def prompt_offsets(prompt: Prompt, text: str, tokens: TokenTexts, codec: TextCodec) -> list[int]:
    """The offsets of a prompt's tokens in its ``text``, which holds special tokens only if the client wrote them."""
    detokenizer = codec.detokenizer(skip_special_tokens=True)
    offsets, place = [], 0
    for token in prompt.token_ids:
        piece = detokenizer.push([token])
        spelt = tokens[token] if token in tokens.special else piece
        # Tokenizers may drop or change characters: search a little further, or continue counting.
        found = text.find(spelt, place, place + 2 * len(spelt) + 8)
        if token in tokens.special:  # one that was added may be spelt further on: then there is text between
            is_next = found >= 0 and not codec.encode(text[place:found], add_special_tokens=False)
            piece, found = (spelt, found) if is_next else ("", place)
        place = found if found >= 0 else place
        offsets.append(place)
        place = min(len(text), place + len(piece))
    return offsets

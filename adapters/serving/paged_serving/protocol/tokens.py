"""Single tokens as text, and log-probabilities in each protocol's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import Logprob, TextCodec

_LOWEST = -9999.0  # JSON has no infinity


class TokenTexts(dict[int, str]):
    """Token id -> its text inside other text, special tokens included; half a character is U+FFFD."""

    def __init__(self, codec: TextCodec) -> None:
        super().__init__()
        self._codec = codec
        self.special = codec.special_token_ids

    def __missing__(self, token: int) -> str:
        text = self[token] = self.bytes(token).decode(errors="replace")
        return text

    def name(self, token: int) -> str:
        """A token's name where it must be unique: its text, or, if it begins or ends inside a character, its bytes as
        OpenAI writes them (``bytes:\\xf0\\x9f``)."""
        spelt = self.bytes(token)
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_shown, spelt))

    def bytes(self, token: int) -> bytes:
        return self._codec.token_bytes(token)

    # ---- OpenAI's forms ------------------------------------------------------------------------------------------

    def chat_logprobs(
        self, token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob]], num_top: int
    ) -> dict[str, Any]:
        """``choices[].logprobs`` of chat completions."""
        content = [
            {
                **self._chat_entry(token, entry[token].logprob),
                "top_logprobs": [
                    self._chat_entry(other, found.logprob)
                    for other, found in sorted(entry.items(), key=lambda item: item[1].rank)[:num_top]
                ],
            }
            for token, entry in zip(token_ids, entries, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _chat_entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self[token], "logprob": finite(logprob), "bytes": list(self.bytes(token))}

    def completion_logprobs(
        self,
        token_ids: Sequence[int],
        entries: Sequence[Mapping[int, Logprob] | None],
        offsets: Sequence[int],
        num_top: int,
    ) -> dict[str, Any]:
        """``choices[].logprobs`` of completions; ``offsets``: characters of the choice's text before each token."""
        return {
            "tokens": [self.name(token) for token in token_ids],
            "token_logprobs": [
                None if entry is None else finite(entry[token].logprob)
                for token, entry in zip(token_ids, entries, strict=True)
            ],
            "top_logprobs": [None if entry is None else self._named(_top(entry, num_top)) for entry in entries],
            "text_offset": list(offsets),
        }

    def _named(self, items: Sequence[tuple[int, Logprob]]) -> dict[str, float]:
        """By name. Of several tokens with one text the first keeps it: the chosen one, if it is among them."""
        named: dict[str, float] = {}
        for token, found in items:
            name = self.name(token)
            named[name if name not in named else f"token_id:{token}"] = finite(found.logprob)
        return named

    def prompt_logprobs(
        self, entries: Sequence[Mapping[int, Logprob] | None], num_top: int
    ) -> list[dict[str, Any] | None]:
        """``prompt_logprobs`` as vLLM's users know them: token id -> logprob, rank, text."""
        return [
            None
            if entry is None
            else {
                str(token): {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": self[token]}
                for token, found in _top(entry, num_top)
            }
            for entry in entries
        ]


class TokenNumbers(TokenTexts):
    """The same, but each token is called ``token_id:`` and its id: vLLM's ``return_tokens_as_token_ids``."""

    def __missing__(self, token: int) -> str:
        text = self[token] = self.name(token)
        return text

    def name(self, token: int) -> str:
        return f"token_id:{token}"


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _shown(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}"


def _top(entry: Mapping[int, Logprob], num: int) -> list[tuple[int, Logprob]]:
    """The token that stands there, which comes first in ``entry``, and the ``num`` likeliest."""
    there = next(iter(entry))
    likeliest = sorted(entry.items(), key=lambda item: item[1].rank)[:num]
    return [(there, entry[there]), *(item for item in likeliest if item[0] != there)]

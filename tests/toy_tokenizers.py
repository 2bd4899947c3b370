"""Tokenizers of a few lines with everything that makes detokenising hard: bytes, a leading space, special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REPLACEMENT = "\ufffd"


class ByteTokenizer:
    """Tokens are strings of bytes: the 256 bytes, some longer ones that begin or end inside characters, and an EOS."""

    LONGER = (" the", "é", "日", REPLACEMENT, "END", "\n\n")
    STRADDLING = (b"\xac\xe2\x82", b"\xe2\x82", b"a\xf0\x9f", b"\x98\x80", b"\xff\xfe")

    def __init__(self) -> None:
        self._tokens = [bytes([byte]) for byte in range(256)]
        self._tokens += [text.encode() for text in self.LONGER] + list(self.STRADDLING)
        self.eos_token_id = len(self._tokens)
        self.all_special_ids = [self.eos_token_id]
        self.size = self.eos_token_id + 1

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<0x{token:02X}>" if token < 256 else self.decode([token])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return b"".join(self._bytes(token, skip_special_tokens) for token in token_ids).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert not tokenize
        if messages[0]["role"] == "assistant":
            raise ValueError("the user speaks first")
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + ("assistant:" if add_generation_prompt else "")

    def _bytes(self, token: int, skip: bool) -> bytes:
        if token == self.eos_token_id:
            return b"" if skip else b"<eos>"
        return self._tokens[token] if token < len(self._tokens) else b""


class SentencePieceTokenizer:
    """Words with a leading ▁, which a text's first word loses, and bytes for everything else. A run of bytes that isn't
    valid UTF-8 becomes one U+FFFD per byte, as in Hugging Face's byte fallback."""

    WORDS = ("▁", "▁Hello", "▁world", "ing", "▁▁", REPLACEMENT, "é", ",", "▁é")

    def __init__(self) -> None:
        self.pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *self.WORDS]
        self.all_special_ids = [0, 1]
        self.first_word = 258

    @staticmethod
    def byte_ids(text: str) -> list[int]:
        return [2 + byte for byte in text.encode()]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([0] if add_special_tokens else []) + self.byte_ids(text)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        parts: list[str] = []
        run = bytearray()
        for token in token_ids:
            if token >= len(self.pieces) or (skip_special_tokens and token in self.all_special_ids):
                continue
            if 2 <= token < self.first_word:
                run.append(token - 2)
                continue
            parts.append(_run_text(run))
            run.clear()
            parts.append(self.pieces[token].replace("▁", " "))
        parts.append(_run_text(run))
        return "".join(parts).removeprefix(" ")


class CharacterTokenizer(ByteTokenizer):
    """For models of about 100 tokens: token i is the character 32 + i, the last is EOS."""

    LONGER = ()
    STRADDLING = ()

    def __init__(self, vocab_size: int = 97) -> None:
        super().__init__()
        self.eos_token_id = vocab_size - 1
        self.all_special_ids = [self.eos_token_id]
        self._tokens = [bytes([32 + token]) for token in range(self.eos_token_id)]
        self.size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [min(byte - 32, self.eos_token_id - 1) for byte in text.replace("\n", " ").encode()]


class ChokingTokenizer(CharacterTokenizer):
    """Raises for token 40."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        if 40 in token_ids:
            raise LookupError("token 40")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


class PartsTokenizer(CharacterTokenizer):
    """Its chat template loops over the parts of each content, as Llama Guard's does; for a string it prints nothing."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        lines = []
        for message in messages:
            texts = [part["text"] for part in message["content"] if isinstance(part, dict) and part["type"] == "text"]
            lines.append(f"{message['role']}: {'+'.join(texts)}\n")
        return "".join(lines) + "assistant:"


class DeafTokenizer(CharacterTokenizer):
    """Its chat template leaves out the messages' texts."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return "assistant: I know what you will say:"


def _run_text(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)

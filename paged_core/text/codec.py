"""Between people's text and the engine's token ids: prompts in, text out. This file knows nothing of engines.

A Hugging Face tokenizer is a Tokenizer as it is. It isn't safe to share between threads, so that TextCodec works on
private copies of it, each behind a lock.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from paged_core.errors import InvalidRequestError
from paged_core.roles import Role
from paged_core.scheduling.params import SamplingParams
from paged_core.text.chat import ChatTemplate
from paged_core.text.detokenizer import (
    REPLACEMENT,
    ByteLevelDetokenizer,
    BytePieces,
    Detokenizer,
    InertTokens,
    WindowDetokenizer,
    is_byte_level,
)

_LONG = 16_384  # characters
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer(Role):
    """What we ask of a tokenizer; Hugging Face's have all of it."""

    eos_token_id: int | Sequence[int] | None = None
    """What it ends texts with."""
    chat_template: Any = None
    """How it writes messages, if it does."""
    response_template: Any = None
    """How the model writes reasoning and calls of tools, as transformers declares it, if it says so."""
    all_special_ids: Sequence[int] = ()
    """Tokens that are no text."""
    added_tokens_decoder: Mapping[int, Any] = {}
    """Tokens that were added to its vocabulary, by id; more of them may be no text."""

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]: ...

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    convert_ids_to_tokens: Callable[[int], str | None] | None = None
    """How the vocabulary spells a token."""
    apply_chat_template: Callable[..., str] | None = None
    """``apply_chat_template(messages, tokenize=False, ...)``: messages in the model's chat format."""


class Prompt(NamedTuple):
    """A prompt ready for the engine."""

    text: str | None  # None when it was given as token ids
    token_ids: list[int]


class TextCodec:
    """A tokenizer made safe for threads. ``tokenizer`` may be None: then only token ids can be served.

    ``eos_token_ids``: what it ends texts with, none or more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encoder, self._decoder = _private_copies(tokenizer)
        self._long_encoder: Tokenizer | None = None  # made with the first long text
        self.eos_token_ids = _eos_token_ids(self._encoder)
        self.renew_locks()
        self._chat = ChatTemplate(self._apply_chat_template)
        self._byte_level = is_byte_level(self._decoder)
        self._pieces: dict[bool, BytePieces] = {}  # by skip_special_tokens
        self._inert: dict[bool, InertTokens] = {}

    @property
    def has_chat_template(self) -> bool:
        return bool(self._encoder.chat_template)

    @property
    def chat_template(self) -> str:
        """The source of the chat template; of several, all of them; empty where there is none."""
        source = self._encoder.chat_template
        texts = source.values() if isinstance(source, Mapping) else [source]
        return "\n".join(each for each in texts if isinstance(each, str))

    @property
    def response_template(self) -> Any:
        """How the model writes reasoning and calls of tools, if the tokenizer says so."""
        return self._encoder.response_template

    @cached_property
    def special_texts(self) -> Sequence[str]:
        """What ``skip_special_tokens`` leaves out, as it is spelt otherwise."""
        if self.tokenizer is None:
            return ()
        tokens = {*self.special_token_ids, *self._decoder.added_tokens_decoder}
        spelt = {self.decode([token]) for token in tokens if not self.decode([token], skip_special_tokens=True)}
        return sorted(spelt - {""})

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        return frozenset(self._encoder.all_special_ids or ())

    def renew_locks(self) -> None:
        """For a forked child: who held one in the parent isn't there to let it go."""
        self._encode_lock = threading.Lock()
        self._decode_lock = self._encode_lock if self._encoder is self._decoder else threading.Lock()
        self._long_lock = self._encode_lock if self._encoder is self._decoder else threading.Lock()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("there is no tokenizer: give the prompt as token ids, or pass tokenizer=...")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text can't be written as UTF-8: {error}") from error
        if len(text) > _LONG and self._encoder is not self._decoder:
            return self._encode_long(text, add_special_tokens)
        with self._encode_lock:
            return list(self._encoder.encode(text, add_special_tokens=add_special_tokens))

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        """By a copy of its own: whoever brings a book doesn't make those wait who bring a line."""
        with self._long_lock:
            if self._long_encoder is None:
                with self._encode_lock:
                    self._long_encoder, _ = _private_copies(self.tokenizer)
            return list(self._long_encoder.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        with self._decode_lock:
            text: str = self._decoder.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A new row's detokenizer."""
        skip = skip_special_tokens
        if self.tokenizer is None:
            return _NoText()

        def decode(token_ids: Sequence[int]) -> str:
            return self.decode(token_ids, skip)

        if self._byte_level:
            return ByteLevelDetokenizer(self._pieces.setdefault(skip, BytePieces(self._decoder, decode)))
        return WindowDetokenizer(decode, self._inert.setdefault(skip, InertTokens(decode)).__getitem__)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for inside a text; part of a character where it is no more."""
        if self.tokenizer is None:
            return b""
        if self._byte_level:
            return self._pieces.setdefault(False, BytePieces(self._decoder, self.decode))[token]
        once = self.decode([token])  # a lone leading space is taken off a text's beginning
        if once == REPLACEMENT and (byte := self._lone_byte(token)) is not None:
            return byte
        return self.decode([token, token])[len(once) :].encode()

    def _lone_byte(self, token: int) -> bytes | None:
        """Of a SentencePiece byte token: spelt <0xE2>, and no character by itself."""
        if self._decoder.convert_ids_to_tokens is None:
            return None
        found = _BYTE_TOKEN.fullmatch(self._decoder.convert_ids_to_tokens(token) or "")
        return bytes.fromhex(found[1]) if found else None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The messages in the model's chat format, ready for the assistant's answer; ``options`` go to the template.

        A message's content is a string or a list of text parts; the template gets what it reads.

        Raises:
            InvalidRequestError: there is no template; these are no messages of text; or the template refuses them, or
                leaves out what the user says.
        """
        if self._encoder.apply_chat_template is None:
            raise InvalidRequestError("chat messages need a tokenizer with a chat template (apply_chat_template)")
        if any("role" not in message or "content" not in message for message in messages):
            raise InvalidRequestError("a chat message must be a dict with 'role' and 'content'")
        with self._encode_lock:
            return self._chat.render(messages, options)

    def _apply_chat_template(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        assert self._encoder.apply_chat_template is not None, "see render_chat"
        try:
            rendered = self._encoder.apply_chat_template(
                [dict(message) for message in messages],
                **{"add_generation_prompt": True, **options, "tokenize": False},
            )
        except Exception as error:  # templates are programs of the model's makers
            raise InvalidRequestError(f"the chat template refused the messages: {error}") from error
        return rendered


def prepare_params(codec: TextCodec, params: SamplingParams) -> SamplingParams:
    """The same parameters with ``bad_words`` spelt as token ids, both as a word's beginning and inside a line.

    Raises:
        InvalidRequestError: they are something else; or they ask for stop strings or bad words, and there is no
            tokenizer.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"the sampling parameters are of type {type(params).__name__}; use SamplingParams")
    if codec.tokenizer is None and (params.stop or params.bad_words):
        raise InvalidRequestError("stop and bad_words are text, and there is no tokenizer; use stop_token_ids instead")
    if not params.bad_words:
        return params
    spellings = [tuple(ids) for ids in params.bad_words_token_ids]
    for word in params.bad_words:
        for spelling in (word, " " + word.lstrip()):
            ids = tuple(codec.encode(spelling, add_special_tokens=False))
            if ids and ids not in spellings:
                spellings.append(ids)
    return dataclasses.replace(params, bad_words=(), bad_words_token_ids=spellings)


class _NoText:
    """The detokenizer of those who have no tokenizer."""

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _eos_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer ends texts with. Of a chat model it may be the only one to know the end of a turn."""
    found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, Sequence) else (int(found),)


def _private_copies(tokenizer: Any) -> tuple[Tokenizer, Tokenizer]:
    """Two; or the tokenizer itself, twice, if it is one of the user's own that can't be copied: it is then shared,
    behind one lock."""
    try:
        first, second = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    except Exception:
        first = second = tokenizer
    encoder = Tokenizer.of(first)
    return encoder, encoder if first is second else Tokenizer.of(second)

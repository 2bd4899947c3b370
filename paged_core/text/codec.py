"""TextCodec: turns prompts into token ids, and token ids into text. This file knows nothing of engines.

A Hugging Face tokenizer fulfils the role Tokenizer. It isn't safe to share between threads, so TextCodec works on
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

_LONG = 16_384  # characters; longer texts are encoded by a copy of their own
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer(Role):
    """What TextCodec needs of a tokenizer. Hugging Face's have all of it."""

    eos_token_id: int | Sequence[int] | None = None
    """The id of its end-of-sequence token."""
    chat_template: Any = None
    """The chat template's source, or several by name."""
    response_template: Any = None
    """How the model writes reasoning and tool calls, as transformers declares it, or None."""
    all_special_ids: Sequence[int] = ()
    """Ids of special tokens, which are no text."""
    added_tokens_decoder: Mapping[int, Any] = {}
    """Tokens added to its vocabulary, by id; some of them may be special too."""

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]: ...

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    convert_ids_to_tokens: Callable[[int], str | None] | None = None
    """Returns the vocabulary's spelling of a token."""
    apply_chat_template: Callable[..., str] | None = None
    """``apply_chat_template(messages, tokenize=False, ...)`` renders messages in the model's chat format."""


class Prompt(NamedTuple):
    """A prompt as token ids."""

    text: str | None  # None if it was given as token ids
    token_ids: list[int]


class TextCodec:
    """A tokenizer made safe for threads. If ``tokenizer`` is None, only token ids can be served.

    ``eos_token_ids``: the tokenizer's end-of-sequence tokens, none or more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encoder, self._decoder = _private_copies(tokenizer)
        self._long_encoder: Tokenizer | None = None  # made when the first long text comes
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
        """The source of the chat template; all sources, if there are several; empty if there is none."""
        source = self._encoder.chat_template
        texts = source.values() if isinstance(source, Mapping) else [source]
        return "\n".join(each for each in texts if isinstance(each, str))

    @property
    def response_template(self) -> Any:
        """How the model writes reasoning and tool calls, if the tokenizer declares it."""
        return self._encoder.response_template

    @cached_property
    def special_texts(self) -> Sequence[str]:
        """The texts of the tokens that ``skip_special_tokens`` leaves out."""
        if self.tokenizer is None:
            return ()
        tokens = {*self.special_token_ids, *self._decoder.added_tokens_decoder}
        spelt = {self.decode([token]) for token in tokens if not self.decode([token], skip_special_tokens=True)}
        return sorted(spelt - {""})

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(self._encoder.all_special_ids or ())

    def renew_locks(self) -> None:
        """Make new locks in a forked child, where the threads that held them don't exist."""
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
        """Encode by a separate copy of the tokenizer, so that a long text doesn't delay short ones."""
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
        """Return a detokenizer for a new row."""
        skip = skip_special_tokens
        if self.tokenizer is None:
            return _NoText()

        def decode(token_ids: Sequence[int]) -> str:
            return self.decode(token_ids, skip)

        if self._byte_level:
            return ByteLevelDetokenizer(self._pieces.setdefault(skip, BytePieces(self._decoder, decode)))
        return WindowDetokenizer(decode, self._inert.setdefault(skip, InertTokens(decode)).__getitem__)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for inside a text, which may be a part of a character."""
        if self.tokenizer is None:
            return b""
        if self._byte_level:
            return self._pieces.setdefault(False, BytePieces(self._decoder, self.decode))[token]
        once = self.decode([token])  # decoders strip a leading space from a text
        if once == REPLACEMENT and (byte := self._lone_byte(token)) is not None:
            return byte
        return self.decode([token, token])[len(once) :].encode()

    def _lone_byte(self, token: int) -> bytes | None:
        """Return the byte of a SentencePiece byte token, spelt <0xE2>, which is no character by itself; else None."""
        if self._decoder.convert_ids_to_tokens is None:
            return None
        found = _BYTE_TOKEN.fullmatch(self._decoder.convert_ids_to_tokens(token) or "")
        return bytes.fromhex(found[1]) if found else None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the messages in the model's chat format, ready for the assistant's answer. ``options`` go to the
        template.

        A message's content is a string or a list of text parts; the template gets the form that it reads.

        Raises:
            InvalidRequestError: there is no template; these are no messages of text; or the template refuses them, or
                leaves out the user's text.
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
        except Exception as error:  # templates are the model makers' programs, and may raise anything
            raise InvalidRequestError(f"the chat template refused the messages: {error}") from error
        return rendered


def prepare_params(codec: TextCodec, params: SamplingParams) -> SamplingParams:
    """Return the parameters with ``bad_words`` as token ids, for a word at a text's beginning and inside a line.

    Raises:
        InvalidRequestError: params are no SamplingParams; or they ask for stop strings or bad words, and there is no
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
    """The detokenizer if there is no tokenizer: it returns no text."""

    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _eos_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokenizer's end-of-sequence tokens. For a chat model, only the tokenizer may know the token that ends
    a turn."""
    found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, Sequence) else (int(found),)


def _private_copies(tokenizer: Any) -> tuple[Tokenizer, Tokenizer]:
    """Return two copies, or the tokenizer itself twice if it is a user's own that can't be copied. It is then shared,
    behind one lock."""
    try:
        first, second = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    except Exception:
        first = second = tokenizer
    encoder = Tokenizer.of(first)
    return encoder, encoder if first is second else Tokenizer.of(second)

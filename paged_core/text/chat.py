"""Chat messages in the form that a model's template reads. The form is found by rendering marker words.

Most templates print a message's content as a string. Some loop over its parts (``{% for c in message['content'] %}``);
for a string these print nothing, and raise no error. Others print a list of parts as Python's repr of a list. So each
form is rendered once with marker words in place of the texts, and the output shows which form each role's messages
need. This file looks at what templates print, not at their source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from paged_core.errors import InvalidRequestError

Apply = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]
"""``apply(messages, options)`` renders the tokenizer's template. It raises InvalidRequestError if the template does."""

_PART_KEYS = {"type", "text", "cache_control"}  # keys of a text part; cache_control is a hint that changes no answer
_PLAIN = {"add_generation_prompt", "continue_final_message"}  # options that don't change the form of any content
_MOST_SHAPES = 64  # kinds of conversations whose forms are cached
_LONGEST_ROLE = 32  # characters of a role; conversations with a longer one are not cached


class ContentFormat(Enum):
    """The form in which a message's content is given to the template."""

    TEXT = "a string: the parts joined by line ends"
    PARTS = "text parts"
    ONE_PART = "one text part: for templates that read the first only"


class Kind(NamedTuple):
    """A kind of messages, which all need the same form."""

    role: str
    has_parts: bool

    @property
    def preferred(self) -> tuple[ContentFormat, ...]:
        if self.has_parts:
            return ContentFormat.PARTS, ContentFormat.TEXT, ContentFormat.ONE_PART
        return ContentFormat.TEXT, ContentFormat.PARTS


class ChatTemplate:
    """A tokenizer's chat template. Only one thread at a time may use it."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        # by the kinds of messages in a conversation
        self._forms: dict[frozenset[Kind], Mapping[Kind, ContentFormat]] = {}

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Return the messages as one text.

        Raises:
            InvalidRequestError: a content is neither a string nor text parts; or the template refuses the messages, or
                leaves out the user's text.
        """
        kinds = [_kind_of(message) for message in messages]
        asked = _asked(messages)
        if asked is None:
            return self._apply([_in_form(message, ContentFormat.TEXT) for message in messages], options)
        forms = self._known_forms(messages, kinds, options)
        if kinds[asked] not in forms:
            return self._render_unsure(messages, asked, options)
        rest = forms[kinds[asked]]  # for messages that the template drops in any form
        told = [_in_form(each, forms.get(kind, rest)) for each, kind in zip(messages, kinds, strict=True)]
        return self._apply(told, options)

    def _known_forms(
        self, messages: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], options: Mapping[str, Any]
    ) -> Mapping[Kind, ContentFormat]:
        """Return cached forms for such a conversation, or find them. Forms found with a caller's own options are not
        cached."""
        shape = frozenset(kinds)
        if shape in self._forms and options.keys() <= _PLAIN:
            return self._forms[shape]
        forms = self._find_forms(messages, kinds, options)
        short = max(len(kind.role) for kind in shape) <= _LONGEST_ROLE
        if forms and short and len(self._forms) < _MOST_SHAPES and options.keys() <= _PLAIN:
            self._forms[shape] = forms
        return forms

    def _find_forms(
        self, messages: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], options: Mapping[str, Any]
    ) -> Mapping[Kind, ContentFormat]:
        """Return the form of each kind of message, without kinds that the template prints in no form."""
        words = [_words(number, message) for number, message in enumerate(messages)]
        seen = {ContentFormat.TEXT: self._seen(messages, kinds, words, [ContentFormat.TEXT] * len(messages), options)}
        if all(not kind.has_parts and kind in seen[ContentFormat.TEXT] for kind in kinds):
            return dict.fromkeys(kinds, ContentFormat.TEXT)
        for form in (ContentFormat.PARTS, ContentFormat.ONE_PART):
            seen[form] = self._seen(messages, kinds, words, [form] * len(messages), options)
            if not seen[form]:  # it may have raised for a role whose content must be a string
                mixed = [ContentFormat.TEXT if kind in seen[ContentFormat.TEXT] else form for kind in kinds]
                found = self._seen(messages, kinds, words, mixed, options)
                seen[form] = {kind: num for kind, num in found.items() if kind not in seen[ContentFormat.TEXT]}
        forms = {}
        for kind in kinds:
            most = max(found.get(kind, 0) for found in seen.values())
            if most:
                forms[kind] = next(form for form in kind.preferred if seen[form].get(kind) == most)
        return forms

    def _seen(
        self,
        messages: Sequence[Mapping[str, Any]],
        kinds: Sequence[Kind],
        words: Sequence[Sequence[str]],
        forms: Sequence[ContentFormat],
        options: Mapping[str, Any],
    ) -> dict[Kind, int]:
        """Return how many marker words appear, by kind of message. Only messages from the last one of the kind that
        lost a word count, because a template may drop old messages."""
        told = [_in_form(message, form, texts) for message, form, texts in zip(messages, forms, words, strict=True)]
        try:
            rendered = self._apply(told, options)
        except InvalidRequestError:
            return {}
        seen: dict[Kind, int] = {}
        for kind, texts in zip(kinds, words, strict=True):
            if all(word in rendered for word in texts):
                seen[kind] = seen.get(kind, 0) + len(texts)
            else:
                seen.pop(kind, None)
        return seen

    def _render_unsure(self, messages: Sequence[Mapping[str, Any]], asked: int, options: Mapping[str, Any]) -> str:
        """Render for templates that don't print words as they are (that quote them, or print only some). The text of
        message ``asked`` matters if the result changes with it."""
        refusal: InvalidRequestError | None = None
        for form in (ContentFormat.TEXT, ContentFormat.PARTS):
            try:
                rendered = self._apply([_in_form(message, form) for message in messages], options)
            except InvalidRequestError as error:
                refusal = refusal or error
                continue
            if self._other_with(messages, asked, form, options) != rendered:
                return rendered
            refusal = refusal or InvalidRequestError(
                f"the chat template leaves out the text of message {asked} ({messages[asked]['role']}), given as a "
                "string and as text parts; render the prompt yourself, and send it as text"
            )
        assert refusal is not None, "both forms were tried"
        raise refusal

    def _other_with(
        self, messages: Sequence[Mapping[str, Any]], asked: int, form: ContentFormat, options: Mapping[str, Any]
    ) -> str | None:
        """Return the result with a longer text in message ``asked``, or None if the template refuses that."""
        told = [_in_form(message, form) for message in messages]
        texts, words = texts_of(messages[asked]) or (), _words(0, messages[asked])
        more = [text + word for text, word in zip(texts, words, strict=True)]
        told[asked] = _in_form(messages[asked], form, more)
        try:
            return self._apply(told, options)
        except InvalidRequestError:
            return None


def texts_of(message: Mapping[str, Any]) -> list[str] | None:
    """Return the texts of a message's parts. A string is one text; None: the message has no content.

    Raises:
        InvalidRequestError: the content is something else.
    """
    content = message["content"]
    if content is None:
        return None
    if isinstance(content, str):
        return [content]
    told = "a chat message's content must be a string or a list of text parts; images and sounds can't be read"
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequestError(told)
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text or not part.keys() <= _PART_KEYS:
            raise InvalidRequestError(told)
    return [part["text"] for part in content]


def _kind_of(message: Mapping[str, Any]) -> Kind:
    return Kind(str(message["role"]), not isinstance(message["content"], str) and texts_of(message) is not None)


def _asked(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the message that must not get lost: the user's last, or else the last, of those with a
    text."""
    spoken = [place for place, message in enumerate(messages) if "".join(texts_of(message) or ()).strip()]
    users = [place for place in spoken if messages[place]["role"] == "user"]
    return max(users or spoken, default=None)


def _in_form(message: Mapping[str, Any], form: ContentFormat, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the message in the form, with its own texts or with ``texts``."""
    if texts is None:
        texts = texts_of(message)
    if texts is None or message["content"] is None:
        return dict(message)
    if form is not ContentFormat.PARTS:
        texts = ["\n".join(texts)]
    content = texts[0] if form is ContentFormat.TEXT else [{"type": "text", "text": text} for text in texts]
    return {**message, "content": content}


def _words(number: int, message: Mapping[str, Any]) -> list[str]:
    """Return a marker word for each text of the message. Each is found only if it is printed plainly: Python's and
    JSON's quoting would double its backslash. Its digits make it differ from all other words."""
    return [f"7{number:04}\\{place:04}7" for place, _ in enumerate(texts_of(message) or ())]

"""Chat messages in the form that a model's template reads: found by rendering words that can be told again.

Most templates print a message's content as a string. Some go over its parts (``{% for c in message['content'] %}``):
of a string they print nothing, and raise no error. Others print a list of parts as Python writes lists. So each form is
rendered once with words of our own in place of the texts, and what comes out says which form each role's messages need.
This file knows templates by what they print and nothing of how they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from paged_core.errors import InvalidRequestError

Apply = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]
"""``apply(messages, options)``: the tokenizer's template; raises InvalidRequestError where that raises."""

_PART_KEYS = {"type", "text", "cache_control"}  # of a text part; the last is a hint that changes no answer
_PLAIN = {"add_generation_prompt", "continue_final_message"}  # options that change no content's form
_MOST_SHAPES = 64  # kinds of conversations whose forms are kept
_LONGEST_ROLE = 32  # characters of a role in those


class ContentFormat(Enum):
    """How a message's content is given to the template."""

    TEXT = "a string: the parts joined by line ends"
    PARTS = "text parts"
    ONE_PART = "one text part: for templates that read the first only"


class Kind(NamedTuple):
    """Messages that need the same form."""

    role: str
    has_parts: bool

    @property
    def preferred(self) -> tuple[ContentFormat, ...]:
        if self.has_parts:
            return ContentFormat.PARTS, ContentFormat.TEXT, ContentFormat.ONE_PART
        return ContentFormat.TEXT, ContentFormat.PARTS


class ChatTemplate:
    """A tokenizer's chat template. Belongs to one thread at a time."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._forms: dict[frozenset[Kind], Mapping[Kind, ContentFormat]] = {}  # by what a conversation holds

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The messages as one text.

        Raises:
            InvalidRequestError: a content is neither a string nor text parts; or the template refuses the messages, or
                leaves out the text of the user.
        """
        kinds = [_kind_of(message) for message in messages]
        asked = _asked(messages)
        if asked is None:
            return self._apply([_in_form(message, ContentFormat.TEXT) for message in messages], options)
        forms = self._known_forms(messages, kinds, options)
        if kinds[asked] not in forms:
            return self._render_unsure(messages, asked, options)
        rest = forms[kinds[asked]]  # messages that no form makes the template print: it drops them
        told = [_in_form(each, forms.get(kind, rest)) for each, kind in zip(messages, kinds, strict=True)]
        return self._apply(told, options)

    def _known_forms(
        self, messages: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], options: Mapping[str, Any]
    ) -> Mapping[Kind, ContentFormat]:
        """As found before for such a conversation. What a caller's own options made of the template is not kept."""
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
        """The form of each kind of message; none for those that the template prints in no form."""
        words = [_words(number, message) for number, message in enumerate(messages)]
        seen = {ContentFormat.TEXT: self._seen(messages, kinds, words, [ContentFormat.TEXT] * len(messages), options)}
        if all(not kind.has_parts and kind in seen[ContentFormat.TEXT] for kind in kinds):
            return dict.fromkeys(kinds, ContentFormat.TEXT)
        for form in (ContentFormat.PARTS, ContentFormat.ONE_PART):
            seen[form] = self._seen(messages, kinds, words, [form] * len(messages), options)
            if not seen[form]:  # it may have raised for a role that needs a string
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
        """How many words come out, by kind of message, counted from the last message of the kind that lost one: a
        template may drop old ones."""
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
        """For templates that don't print words as they are: they quote them, say, or take only some. Whether the text
        of message ``asked`` counts shows when it is another."""
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
        """What is rendered if message ``asked`` says more; None if the template refuses that."""
        told = [_in_form(message, form) for message in messages]
        texts, words = texts_of(messages[asked]) or (), _words(0, messages[asked])
        more = [text + word for text, word in zip(texts, words, strict=True)]
        told[asked] = _in_form(messages[asked], form, more)
        try:
            return self._apply(told, options)
        except InvalidRequestError:
            return None


def texts_of(message: Mapping[str, Any]) -> list[str] | None:
    """The texts of a message's parts; one, if its content is a string; None if it has no content.

    Raises:
        InvalidRequestError: it has something else.
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
    """Which message may not get lost: the user's last, or else the last, of those that have a text."""
    spoken = [place for place, message in enumerate(messages) if "".join(texts_of(message) or ()).strip()]
    users = [place for place in spoken if messages[place]["role"] == "user"]
    return max(users or spoken, default=None)


def _in_form(message: Mapping[str, Any], form: ContentFormat, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """The message with its texts, or with others in their place, in the form."""
    if texts is None:
        texts = texts_of(message)
    if texts is None or message["content"] is None:
        return dict(message)
    if form is not ContentFormat.PARTS:
        texts = ["\n".join(texts)]
    content = texts[0] if form is ContentFormat.TEXT else [{"type": "text", "text": text} for text in texts]
    return {**message, "content": content}


def _words(number: int, message: Mapping[str, Any]) -> list[str]:
    """A word for each text of the message. Each is found only where it is printed plainly: a backslash is doubled where
    Python or JSON quotes it, and the digits around it are no other word's."""
    return [f"7{number:04}\\{place:04}7" for place, _ in enumerate(texts_of(message) or ())]

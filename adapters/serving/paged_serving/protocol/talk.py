"""A conversation as one served model takes it: its prompt, what the answer must follow, and how that is read."""

from __future__ import annotations

from dataclasses import dataclass

from paged_core import InvalidRequestError, Prompt
from paged_serving.conversation.reader import ChoiceReader, PlainText
from paged_serving.conversation.rendering import render
from paged_serving.conversation.turns import Conversation
from paged_serving.protocol.parsing import ProtocolError
from paged_serving.protocol.served import ServedModel

_NO_TOOLS = "asks for tools, and how this model calls them isn't known here; give the server a --response-template"


@dataclass(frozen=True)
class Fields:
    """What the protocol at hand calls the parts of a conversation: errors name them."""

    turns: str = "messages"
    tools: str = "tools"
    choice: str = "tool_choice"


@dataclass(frozen=True)
class Talk:
    """What a conversation comes to."""

    prompt: Prompt  # not yet cut or checked for its length

    def reader(self) -> ChoiceReader:
        """A new choice's."""
        return ChoiceReader(PlainText())


def to_talk(
    conversation: Conversation, served: ServedModel, fields: Fields, *, add_special_tokens: bool = False
) -> Talk:
    """``add_special_tokens``: those of the tokenizer beside those of the chat template.

    Raises:
        ProtocolError: the chat template refuses it, or it asks for tools and nobody knows how the model calls them.
    """
    if conversation.tools and conversation.choice.mode != "none":
        raise ProtocolError(f"{fields.tools} {_NO_TOOLS}", fields.tools)
    try:
        text = render(served.codec, conversation)
    except InvalidRequestError as error:
        raise ProtocolError(str(error), fields.turns) from error
    return Talk(served.encode(text, add_special_tokens=add_special_tokens))

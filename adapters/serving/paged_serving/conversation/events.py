"""The events of an answer: one stream, whatever the protocol, streamed or not. One choice gives, in the order in which
the model writes them: pieces of text and of reasoning, and calls, each as a ToolCallStart, ArgumentsDeltas and a
ToolCallEnd. The last event is its Finish. A call gives events only when it is complete, so that nobody carries out an
incomplete call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from paged_serving.conversation.turns import ToolCall


@dataclass(frozen=True)
class TextDelta:
    """More of the assistant's text."""

    text: str  # never empty


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the assistant's reasoning."""

    text: str  # never empty


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; ``index`` counts the calls of this choice, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the JSON text of call ``index``'s arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """Call ``index`` is complete."""

    index: int


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Finish:
    """The choice has ended. A choice that ends in an error or an abort has no Finish; the owner of the call raises."""

    reason: FinishReason  # "tool_calls": it stopped by itself, with calls
    stop_reason: str | int | None  # the stop string or the stop token id that ended it; None for EOS
    num_tokens: int  # all tokens of the choice


Event = TextDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd | Finish


@dataclass
class Answer:
    """All events of one choice, joined."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish: Finish | None = None  # None: it goes on

    def add(self, events: Iterable[Event]) -> Answer:
        """Itself, with ``events`` added."""
        for event in events:
            match event:
                case TextDelta(text):
                    self.text += text
                case ReasoningDelta(text):
                    self.reasoning += text
                case ToolCallStart(_, id, name):
                    self.tool_calls.append(ToolCall(id, name, ""))
                case ArgumentsDelta(index, text):
                    call = self.tool_calls[index]
                    self.tool_calls[index] = ToolCall(call.id, call.name, call.arguments + text)
                case Finish():
                    self.finish = event
        return self

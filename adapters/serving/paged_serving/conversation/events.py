"""What answers are made of: one stream of events, whatever the protocol and whether it is streamed.

Of one choice come, in this order and as often as the model does it: pieces of text and of reasoning, and calls, each
a ToolCallStart, its ArgumentsDeltas and a ToolCallEnd. The last event is its Finish. A call is told when it is whole:
what was cut in the midst of one is not told, so that nobody carries out half a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from paged_serving.conversation.turns import ToolCall


@dataclass(frozen=True)
class TextDelta:
    """More of what the assistant says."""

    text: str  # never empty


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the assistant thinks before it speaks or calls."""

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
    """Call ``index`` is whole."""

    index: int


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Finish:
    """The choice has ended. What ends in an error or an abort has no Finish: whoever carries the call raises."""

    reason: FinishReason  # "tool_calls": it stopped by itself, and has called
    stop_reason: str | int | None  # the stop string or the stop token id that ended it; None for EOS
    num_tokens: int  # that the choice was given, all in all


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

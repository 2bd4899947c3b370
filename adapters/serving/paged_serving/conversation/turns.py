"""Conversations: messages and tools, into which the bodies of all protocols are translated.

Knows no protocol and no model. The model's chat template renders it (see ``rendering``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant has made."""

    id: str  # that the tool's answer names; made by the server, or given back by the client
    name: str
    arguments: str  # JSON text of an object


@dataclass(frozen=True)
class Turn:
    """One message. Calls of tools are in ``tool_calls``; a tool's result has the role "tool"."""

    role: str  # "system", "developer", "user", "assistant", "tool": as far as the chat template knows it
    content: str | Sequence[str] | None = None  # a text; or text parts; None: nothing is said, tools are called
    name: str | None = None  # of who speaks; of the tool that answers
    reasoning: str | None = None  # of the assistant, before it spoke
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None  # which call a tool answers


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # a JSON schema of an object; None: it takes none
    strict: bool = False  # arguments that don't follow the schema can't be chosen


@dataclass(frozen=True)
class ToolChoice:
    """Which tools may or must be called, and how many."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: Sequence[str] | None = None  # the tools among which to choose; None: all
    parallel: bool = True  # several calls in one answer


@dataclass(frozen=True)
class Conversation:
    """What the model is asked to continue."""

    turns: Sequence[Turn]
    tools: Sequence[Tool] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    template_options: Mapping[str, Any] = field(default_factory=dict)  # handed to the chat template
    reasoning_effort: str | None = None  # handed to the chat template, if it reads that
    thinks: bool | None = None  # before it speaks, if the chat template has such a switch; None: as the template has it
    continues_last: bool = False  # the last message is one that the answer goes on with
    opens_answer: bool = True  # the prompt ends where the assistant begins to speak

    @property
    def callable_tools(self) -> Sequence[Tool]:
        """The tools that the answer may call."""
        names = self.choice.names
        if self.choice.mode == "none":
            return ()
        return [tool for tool in self.tools if names is None or tool.name in names]

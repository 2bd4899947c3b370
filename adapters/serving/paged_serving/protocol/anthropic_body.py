"""The body of POST /v1/messages (Anthropic's), and its conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from paged_serving.conversation.turns import Conversation, Tool, ToolCall, ToolChoice, Turn
from paged_serving.protocol.bodies import Body, Ignored, Positive, Text, ToolName, must, only
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.sampling_body import SamplingBody

_TEXT_ONLY = "a string or a list of text blocks; this server reads text only"
_KINDS = '"text", "tool_use", "tool_result", "thinking" or "redacted_thinking": this server reads text only'


class TextBlock(Body, frozen=True):
    type: Annotated[Literal["text"], must('"text": this server reads text only')]
    text: str
    cache_control: Ignored = None
    citations: Ignored = None


class Block(Body, frozen=True):
    """A part of a message; which fields it has depends on its type."""

    type: Annotated[Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"], must(_KINDS)]
    text: str | None = None
    id: str | None = None  # this and what follows: of a call
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None  # this and what follows: of a tool's answer
    content: Annotated[str | list[TextBlock], must(_TEXT_ONLY)] | None = None
    is_error: Ignored = None  # its content says so
    thinking: str | None = None
    signature: Ignored = None
    data: Ignored = None
    cache_control: Ignored = None
    citations: Ignored = None
    caller: Ignored = None


class AnthropicMessage(Body, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: Annotated[str | list[Block], must("a string or a list of blocks")]


class ToolBody(Body, frozen=True):
    name: ToolName
    input_schema: dict[str, Any]
    description: str = ""
    type: Annotated[Literal["custom"], must('"custom": this server runs no tools of its own')] = "custom"
    strict: bool = False
    cache_control: Ignored = None


class ToolChoiceBody(Body, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body, frozen=True):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Ignored = None  # max_tokens limits text and reasoning together
    display: Ignored = None


class TalkBody(SamplingBody, frozen=True, kw_only=True):
    """The common fields of asking and counting."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1), must("a list of at least one object")]
    system: Annotated[str | list[TextBlock], must(_TEXT_ONLY)] | None = None
    tools: list[ToolBody] = field(default_factory=list)
    tool_choice: ToolChoiceBody | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    mcp_servers: Annotated[Any, only([], why="can't be honoured: this server calls no other")] = None
    container: Annotated[Any, only(why="can't be honoured: this server runs no code")] = None
    output_config: Ignored = None
    context_management: Ignored = None
    cache_control: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    inference_geo: Ignored = None


class MessagesBody(TalkBody, frozen=True, kw_only=True):
    elsewhere: ClassVar[Mapping[str, str]] = {
        "max_completion_tokens": "is OpenAI's; use max_tokens",
        "response_format": "is OpenAI's; use POST /v1/chat/completions",
        "n": "can't be honoured: there is one answer",
    }
    max_tokens: Positive
    stop_sequences: Annotated[list[Text], must("a list of strings, none of them empty")] = field(default_factory=list)


class CountBody(TalkBody, frozen=True, kw_only=True):
    """Of POST /v1/messages/count_tokens."""

    max_tokens: Ignored = None
    stop_sequences: Ignored = None


def to_conversation(body: TalkBody) -> Conversation:
    """The answer continues a last message of the assistant's.

    Raises:
        ProtocolError: invalid messages, or a choice of a missing tool.
    """
    turns = [] if body.system is None else [Turn("system", _text(body.system))]
    for place, message in enumerate(body.messages):
        turns += _turns(message, f"messages[{place}]")
    return Conversation(
        turns=turns,
        tools=[Tool(each.name, each.description, each.input_schema, each.strict) for each in body.tools],
        choice=_choice(body),
        template_options=body.chat_template_kwargs or {},
        thinks=None if body.thinking is None else body.thinking.type != "disabled",
        continues_last=body.messages[-1].role == "assistant",
    )


def _turns(message: AnthropicMessage, path: str) -> Iterator[Turn]:
    if isinstance(message.content, str):
        yield Turn(message.role, message.content)
        return
    blocks = message.content
    for place, block in enumerate(blocks):
        _check(block, message.role, f"{path}.content[{place}]")
    if message.role == "assistant":
        yield _assistant(blocks)
        return
    for block in blocks:
        if block.type == "tool_result":
            yield Turn("tool", _text(block.content or ""), tool_call_id=block.tool_use_id)
    texts = [block.text or "" for block in blocks if block.type == "text"]
    if texts:
        yield Turn(message.role, texts)


_NEEDED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
}


def _check(block: Block, role: str, path: str) -> None:
    whose = {"tool_result": "user"}.get(block.type, "assistant")
    if block.type != "text" and role != whose:
        refuse(f"{path}.type", f"is {block.type!r}, which can't be of role {role!r}")
    for name in _NEEDED[block.type]:
        if getattr(block, name) is None:
            refuse(f"{path}.{name}", f"is missing; a block of type {block.type!r} has it")


def _assistant(blocks: Sequence[Block]) -> Turn:
    text = "".join(block.text or "" for block in blocks if block.type == "text")
    thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    calls = [
        ToolCall(block.id or "", block.name or "", json.dumps(block.input, ensure_ascii=False))
        for block in blocks
        if block.type == "tool_use"
    ]
    return Turn("assistant", text if text or not calls else None, reasoning=thought or None, tool_calls=calls)


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _choice(body: TalkBody) -> ToolChoice:
    asked, known = body.tool_choice, [each.name for each in body.tools]
    if asked is None:
        return ToolChoice()
    parallel = not asked.disable_parallel_tool_use
    if asked.type in ("any", "tool") and not known:
        refuse("tool_choice", f"is {asked.type!r}, and there are no tools")
    if asked.type == "tool":
        if asked.name not in known:
            refuse("tool_choice.name", f"is {asked.name!r}, which is not among the tools")
        return ToolChoice("required", [str(asked.name)], parallel=False)
    return ToolChoice("required" if asked.type == "any" else asked.type, parallel=parallel)

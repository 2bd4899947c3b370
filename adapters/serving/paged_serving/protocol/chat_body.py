"""The body of POST /v1/chat/completions, and its conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from paged_serving.conversation.turns import Conversation, Tool, ToolCall, ToolChoice, Turn
from paged_serving.protocol.bodies import Body, Ignored, Positive, ToolName, Whole, must, only
from paged_serving.protocol.openai_body import OpenAIBody
from paged_serving.protocol.parsing import refuse, refuse_unless_object
from paged_serving.protocol.reading import read_body
from paged_serving.protocol.served import ServedModel

_OLD = "is OpenAI's older way to call functions, which this server doesn't know; use tools"
_IN_THE_TEMPLATE = "can't be honoured; if the chat template has such a switch, use chat_template_kwargs"
_CHOICE = (
    '"none", "auto", "required", {"type": "function", "function": {"name": NAME}}, '
    'or {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


class TextPart(Body, frozen=True):
    type: Annotated[Literal["text"], must('"text": this server reads text only')]
    text: str
    cache_control: Ignored = None


class CalledFunction(Body, frozen=True):
    name: str
    arguments: str | dict[str, Any] = "{}"


class CalledTool(Body, frozen=True):
    """A call that the assistant has made, sent back."""

    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"
    index: Ignored = None


class ChatMessage(Body, frozen=True):
    role: str
    content: (
        Annotated[str | list[TextPart], must("a string or a list of text parts; this server reads text only")] | None
    ) = None
    name: str | None = None
    tool_calls: list[CalledTool] = field(default_factory=list)
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: Annotated[Any, only([], why=_OLD)] = None
    audio: Annotated[Any, only(why="asks for sound; this server reads and writes text")] = None
    refusal: Ignored = None  # this and what follows: of an answer that is sent back
    annotations: Ignored = None


class Function(Body, frozen=True):
    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ChatTool(Body, frozen=True):
    type: Literal["function"]
    function: Function


class NamedFunction(Body, frozen=True):
    name: str


class NamedTool(Body, frozen=True):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body, frozen=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1)]


class ChatToolChoice(Body, frozen=True):
    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    elsewhere: ClassVar[Mapping[str, str]] = {
        "prompt": "is for completions; use messages, or POST /v1/completions",
        "suffix": "is for completions; use messages",
        "inputs": "is TGI's; use messages, or POST /generate",
    }
    messages: Annotated[list[ChatMessage], Meta(min_length=1), must("a list of at least one object")]
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: Whole | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    tools: list[ChatTool] = field(default_factory=list)
    tool_choice: Annotated[Literal["none", "auto", "required"] | ChatToolChoice, must(_CHOICE)] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Annotated[str, Meta(pattern="^[a-z]{1,16}$"), must('a word such as "low"')] | None = None
    include_reasoning: bool = True

    chat_template: Annotated[Any, only(why="can't be set by a request: a template is a program")] = None
    functions: Annotated[Any, only([], why=_OLD)] = None
    function_call: Annotated[Any, only("none", "auto", why=_OLD)] = None
    modalities: Annotated[Any, only(["text"], why='can only be ["text"]')] = None
    audio: Annotated[Any, only(why="asks for sound; this server writes text")] = None
    prediction: Annotated[Any, only(why="can't be honoured: this server takes no predicted output")] = None
    web_search_options: Annotated[Any, only(why="can't be honoured: this server searches nothing")] = None
    moderation: Annotated[Any, only(why="can't be honoured: this server moderates nothing")] = None
    verbosity: Annotated[Any, only(why=_IN_THE_TEMPLATE)] = None


def read_chat(value: Any, served: ServedModel) -> ChatBody:
    """Raises ProtocolError as ``read_body`` and ``check_number`` do."""
    check_number(value, served)
    return read_body(ChatBody, value, served)


def check_number(value: Any, served: ServedModel) -> None:
    """Raises ProtocolError, without reading them, for more messages than the model has positions."""
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if isinstance(messages, list) and len(messages) > served.max_model_len:
        refuse("messages", f"holds {len(messages)} objects; at most {served.max_model_len} can be served")


def to_conversation(body: ChatBody) -> Conversation:
    """
    Raises:
        ProtocolError: invalid messages, or a choice of a missing tool.
    """
    tools = [Tool(**{name: getattr(each.function, name) for name in Function.__struct_fields__}) for each in body.tools]
    return Conversation(
        turns=[_turn(each, f"messages[{place}]") for place, each in enumerate(body.messages)],
        tools=tools,
        choice=_choice(body),
        template_options=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        continues_last=body.continue_final_message,
        opens_answer=body.add_generation_prompt,
    )


def _turn(message: ChatMessage, path: str) -> Turn:
    if message.role == "function":
        refuse(f"{path}.role", _OLD)
    if message.tool_calls and message.role != "assistant":
        refuse(f"{path}.tool_calls", f"can't be of role {message.role!r}: the assistant calls tools")
    if message.tool_call_id is not None and message.role != "tool":
        refuse(f"{path}.tool_call_id", f"can't be of role {message.role!r}: a tool answers a call")
    if message.content is None and not message.tool_calls:
        refuse(f"{path}.content", "is missing; it must be a string or a list of text parts")
    content = message.content
    return Turn(
        role=message.role,
        content=[part.text for part in content] if isinstance(content, list) else content,
        name=message.name,
        reasoning=message.reasoning_content or message.reasoning,
        tool_calls=[
            ToolCall(each.id, each.function.name, _arguments(each.function, f"{path}.tool_calls[{place}]"))
            for place, each in enumerate(message.tool_calls)
        ],
        tool_call_id=message.tool_call_id,
    )


def _arguments(function: CalledFunction, path: str) -> str:
    """The arguments as JSON text of an object, which chat templates get as an object."""
    if isinstance(function.arguments, dict):
        return json.dumps(function.arguments, ensure_ascii=False)
    refuse_unless_object(f"{path}.function.arguments", function.arguments)
    return function.arguments or "{}"


def _choice(body: ChatBody) -> ToolChoice:
    """The tool choice; by default the model may call the given tools."""
    asked, parallel = body.tool_choice, body.parallel_tool_calls
    if asked is None or isinstance(asked, str):
        if asked == "required" and not body.tools:
            refuse("tool_choice", 'is "required", and there are no tools')
        return ToolChoice(asked or "auto", parallel=parallel)
    if (asked.type == "function") is not (asked.function is not None) or (asked.function is None) is not (
        asked.allowed_tools is not None
    ):
        refuse("tool_choice", f"must be {_CHOICE}")
    if asked.function is not None:
        return _among(body, ToolChoice("required", [asked.function.name], parallel=False), "tool_choice.function.name")
    assert asked.allowed_tools is not None, "one of the two is there"
    names = [each.function.name for each in asked.allowed_tools.tools]
    return _among(body, ToolChoice(asked.allowed_tools.mode, names, parallel), "tool_choice.allowed_tools")


def _among(body: ChatBody, choice: ToolChoice, field: str) -> ToolChoice:
    known = [each.function.name for each in body.tools]
    for name in choice.names or ():
        if name not in known:
            refuse(field, f"names {name!r}, which is not among the tools")
    return choice

"""The body of POST /v1/responses, and its conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import field

from paged_serving.conversation.turns import Conversation, Tool, ToolChoice, Turn
from paged_serving.protocol.bodies import Body, Ignored, Positive, Text, ToolName, must, only
from paged_serving.protocol.parsing import refuse
from paged_serving.protocol.responses_input import Item, turns_of
from paged_serving.protocol.sampling_body import SamplingBody
from paged_serving.protocol.structured import Structure

_LOGPROBS = "message.output_text.logprobs"
_NOT_STORED = "can't be honoured: this server keeps responses, and no conversations or prompts"


class ResponsesTool(Body, frozen=True):
    type: Annotated[Literal["function"], must('"function": this server runs no tools of its own')]
    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ResponsesToolChoice(Body, frozen=True):
    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


class Format(Body, frozen=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None
    name: Ignored = None
    description: Ignored = None
    strict: Ignored = None


class TextConfig(Body, frozen=True):
    format: Format = field(default_factory=Format)
    verbosity: Annotated[Any, only("medium", why="can't be honoured")] = None


class Reasoning(Body, frozen=True):
    effort: str | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ResponsesBody(SamplingBody, frozen=True, kw_only=True):
    elsewhere: ClassVar[Mapping[str, str]] = {
        "messages": "is for chats; use input",
        "prompt_text": "isn't known; use input",
        "max_tokens": "is for chats; use max_output_tokens",
        "max_completion_tokens": "is for chats; use max_output_tokens",
        "response_format": "is for chats; use text.format",
        "n": "can't be honoured: a response has one answer",
    }
    input: Annotated[Text | list[Item], must("a string that isn't empty, or a list of items")]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    previous_response_id: str | None = None
    store: bool = True
    metadata: dict[str, Any] | None = None
    tools: list[ResponsesTool] = field(default_factory=list)
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ResponsesToolChoice,
        must('"none", "auto", "required", or an object that names tools'),
    ] = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = field(default_factory=TextConfig)
    reasoning: Reasoning = field(default_factory=Reasoning)
    chat_template_kwargs: dict[str, Any] | None = None

    truncation: Annotated[Any, only("disabled", why="can only be disabled: nothing is left out silently")] = None
    background: Annotated[Any, only(False, why="can't be honoured: answers are waited for")] = None
    conversation: Annotated[Any, only(why=_NOT_STORED)] = None
    prompt: Annotated[Any, only(why=_NOT_STORED)] = None
    top_logprobs: Annotated[Any, only(0, why="can't be honoured here; chats have log-probabilities")] = None
    moderation: Annotated[Any, only(why="can't be honoured: this server moderates nothing")] = None
    include: Any = None  # parts of tools that aren't there, reasoning that isn't encrypted; see check_include
    max_tool_calls: Ignored = None
    stream_options: Ignored = None
    service_tier: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


def check_include(body: ResponsesBody) -> None:
    """Raises ProtocolError if ``body`` asks for a part that the answer would have elsewhere, and hasn't here."""
    if isinstance(body.include, list) and _LOGPROBS in body.include:
        refuse("include", f"can't hold {_LOGPROBS!r}: chats have log-probabilities, and responses don't")


def to_conversation(body: ResponsesBody, earlier: Sequence[Turn]) -> Conversation:
    """``earlier``: of the responses before. Their instructions are not among them, as OpenAI has it.

    Raises:
        ProtocolError: invalid items, or a choice of a missing tool.
    """
    opening = [] if body.instructions is None else [Turn("system", body.instructions)]
    effort = body.reasoning.effort
    return Conversation(
        turns=[*opening, *earlier, *input_turns(body)],
        tools=[Tool(each.name, each.description, each.parameters, each.strict) for each in body.tools],
        choice=_choice(body),
        template_options=body.chat_template_kwargs or {},
        reasoning_effort=effort,
    )


def input_turns(body: ResponsesBody) -> list[Turn]:
    """What the body adds to the conversation."""
    if isinstance(body.input, str):
        return [Turn("user", body.input)]
    if not body.input:
        refuse("input", "is empty; it must hold one item at least")
    return list(turns_of(body.input))


def structure_of(body: ResponsesBody) -> Structure | None:
    asked = body.text.format
    if (asked.type == "json_schema") is not (asked.schema is not None):
        refuse("text.format", "must have a schema if it is of type json_schema, and only then")
    if asked.type == "text":
        return None
    return Structure("text.format", "json", asked.schema or {"type": "object"})


def _choice(body: ResponsesBody) -> ToolChoice:
    asked, parallel, known = body.tool_choice, body.parallel_tool_calls, [each.name for each in body.tools]
    if isinstance(asked, str):
        if asked == "required" and not known:
            refuse("tool_choice", 'is "required", and there are no tools')
        return ToolChoice(asked, parallel=parallel)
    names = [asked.name] if asked.type == "function" else [each.get("name") for each in asked.tools]
    for name in names or [None]:
        if name not in known:
            field = "tool_choice.name" if asked.type == "function" else "tool_choice.tools"
            refuse(field, f"names {name!r}, which is not among the tools")
    told = [str(name) for name in names]
    if asked.type == "function":  # it is called once, as in chats
        return ToolChoice("required", told, parallel=False)
    return ToolChoice(asked.mode or "auto", told, parallel)

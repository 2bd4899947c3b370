"""What POST /v1/responses takes, and the conversation that it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from msgspec import field

from paged_serving.conversation.turns import Conversation, Tool, ToolCall, ToolChoice, Turn
from paged_serving.protocol.bodies import Body, Ignored, Positive, Text, ToolName, must, only
from paged_serving.protocol.parsing import refuse, refuse_unless_object
from paged_serving.protocol.sampling_body import SamplingBody
from paged_serving.protocol.structured import Structure

_TEXT_ONLY = "a string or a list of text parts; this server reads text only"
_LOGPROBS = "message.output_text.logprobs"
_NOT_STORED = "can't be honoured: this server keeps responses, and no conversations or prompts"


class Part(Body, frozen=True):
    type: Annotated[
        Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"],
        must('"input_text" or "output_text": this server reads text only'),
    ]
    text: str = ""
    refusal: str = ""
    annotations: Ignored = None
    logprobs: Ignored = None


_Content = Annotated[str | list[Part], must(_TEXT_ONLY)]


class Item(Body, frozen=True):
    """A message, a call of the assistant's, a tool's answer to one, or what the assistant thought before."""

    type: Annotated[
        Literal["message", "function_call", "function_call_output", "reasoning"],
        must('"message", "function_call", "function_call_output" or "reasoning"'),
    ] = "message"
    role: str | None = None
    content: _Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = "{}"
    output: _Content | None = None
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None
    summary: Ignored = None
    encrypted_content: Ignored = None


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
        ProtocolError: items that are none, or a choice among tools that aren't there.
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
    return list(_joined(body.input))


def structure_of(body: ResponsesBody) -> Structure | None:
    asked = body.text.format
    if (asked.type == "json_schema") is not (asked.schema is not None):
        refuse("text.format", "must have a schema if it is of type json_schema, and only then")
    if asked.type == "text":
        return None
    return Structure("text.format", "json", asked.schema or {"type": "object"})


def _joined(items: Sequence[Item]) -> Iterator[Turn]:
    """Calls, and what was thought and said before them, are one turn of the assistant's."""
    said: list[Item] = []
    for place, item in enumerate(items):
        path = f"input[{place}]"
        if item.type == "function_call":
            _check_call(item, path)
            said.append(item)
        elif item.type == "reasoning" or (item.type == "message" and item.role == "assistant"):
            if item.type == "message" and any(each.type != "reasoning" for each in said):
                yield _assistant(said)
                said = []
            said.append(item)
        else:
            if said:
                yield _assistant(said)
                said = []
            yield _told(item, path)
    if said:
        yield _assistant(said)


def _assistant(items: Sequence[Item]) -> Turn:
    texts = {
        kind: "".join(_text(each.content) for each in items if each.type == kind) for kind in ("message", "reasoning")
    }
    calls = [
        ToolCall(each.call_id or "", each.name or "", each.arguments) for each in items if each.type == "function_call"
    ]
    content = texts["message"] if texts["message"] or not calls else None
    return Turn("assistant", content, reasoning=texts["reasoning"] or None, tool_calls=calls)


def _told(item: Item, path: str) -> Turn:
    if item.type == "function_call_output":
        if item.call_id is None:
            refuse(f"{path}.call_id", "is missing; it must be a call's")
        if item.output is None:
            refuse(f"{path}.output", f"is missing; it must be {_TEXT_ONLY}")
        return Turn("tool", _text(item.output), tool_call_id=item.call_id)
    if item.role is None:
        refuse(f"{path}.role", "is missing; it must be a string")
    if item.content is None:
        refuse(f"{path}.content", f"is missing; it must be {_TEXT_ONLY}")
    content = item.content
    return Turn(item.role, content if isinstance(content, str) else [part.text or part.refusal for part in content])


def _check_call(item: Item, path: str) -> None:
    if item.name is None:
        refuse(f"{path}.name", "is missing; it must be a string")
    refuse_unless_object(f"{path}.arguments", item.arguments)


def _text(content: str | Sequence[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal for part in content)


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
    return ToolChoice("required" if asked.type == "function" else asked.mode or "auto", told, parallel)

"""A conversation as the model's chat template writes it.

Templates differ in what they read: arguments as an object or as its JSON text, a message without content as None or as
an empty text. Each form is tried until the template accepts one and shows every call.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from paged_core import InvalidRequestError, TextCodec
from paged_serving.conversation.turns import Conversation, Tool, ToolCall, Turn

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_MARK = "paged_core_call_"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates call it
_SWITCHES = ("enable_thinking", "thinking")  # by which templates let a model think or not


class _Form(NamedTuple):
    """How messages with calls are given to a template."""

    arguments_as_text: bool
    no_content: str | None


_FORMS = (_Form(False, None), _Form(False, ""), _Form(True, None), _Form(True, ""))


def render(codec: TextCodec, conversation: Conversation, defaults: Mapping[str, Any] | None = None) -> str:
    """The prompt's text. ``defaults``: variables of the template that the conversation doesn't set.

    Raises:
        InvalidRequestError: there is no chat template, it refuses the conversation, or it leaves out the user's text, a
        call, or a tool (``param`` is then "tools"). Or it has no setting for reasoning (``param`` is
        "reasoning_effort", and the error's text continues the field's name).
    """
    options = {**(defaults or {}), **_options(codec, conversation)}
    called = [call for turn in conversation.turns for call in turn.tool_calls]
    forms = _FORMS if called or any(turn.content is None for turn in conversation.turns) else _FORMS[:1]
    refusal: InvalidRequestError | None = None
    for form in forms:
        messages = [_message(codec, turn, form) for turn in conversation.turns]
        try:
            text = codec.render_chat(messages, **options)
            renamed = codec.render_chat(_renamed(messages), **options) if called else text
        except InvalidRequestError as error:
            refusal = refusal or error
            continue
        if all(_is_shown(call, number, text, renamed) for number, call in enumerate(called)):
            _check_tools(conversation, text)
            return text
    raise refusal or InvalidRequestError(
        f"the chat template leaves out calls of tools, such as that of {called[0].name}; tell of them in a text"
    )


def _renamed(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls under unique names (the real names also occur among the tools), to see whether the template shows them."""
    renamed, numbers = copy.deepcopy(list(messages)), itertools.count()
    for call in (call for message in renamed for call in message.get("tool_calls", ())):
        call["function"]["name"] = f"{_MARK}{next(numbers)}_"
    return renamed


def _is_shown(call: ToolCall, number: int, text: str, renamed: str) -> bool:
    """Whether a call's name is shown, and its arguments are not in Python's notation."""
    arguments = json.loads(call.arguments)
    spelt = repr(arguments)
    as_json = not arguments or spelt == json.dumps(arguments) or spelt not in text
    return as_json and call.name in text and f"{_MARK}{number}_" in renamed


def _check_tools(conversation: Conversation, text: str) -> None:
    for tool in conversation.callable_tools:
        if tool.name not in text:
            told = f"the chat template of this model doesn't tell it of tools ({tool.name} is left out)"
            raise InvalidRequestError(f"{told}; describe them in a message", "tools")


def _options(codec: TextCodec, conversation: Conversation) -> dict[str, Any]:
    """All variables of the template besides the messages."""
    options: dict[str, Any] = dict(conversation.template_options)
    source, effort, thinks = codec.chat_template, conversation.reasoning_effort, conversation.thinks
    options = {**_effort(source, effort), **({} if thinks is None else _switched(source, thinks)), **options}
    if tools := conversation.callable_tools:
        options["tools"] = [_tool(each) for each in tools]
    if not conversation.opens_answer:
        options["add_generation_prompt"] = False
    if conversation.continues_last:
        options.update(add_generation_prompt=False, continue_final_message=True)
    return options


def _effort(source: str, effort: str | None) -> dict[str, Any]:
    """The variable by which a template reads the reasoning effort."""
    if effort is None:
        return {}
    if _reads(source, "reasoning_effort") and effort != "none":
        return {"reasoning_effort": effort}
    if (switched := _switched(source, effort != "none")) or effort == "none":
        return switched
    raise InvalidRequestError(
        "can't be honoured: the chat template of this model reads no such option; leave it out",
        "reasoning_effort",
    )


def _switched(source: str, thinks: bool) -> dict[str, Any]:
    return dict.fromkeys([name for name in _SWITCHES if _reads(source, name)][:1], thinks)


def _reads(source: str, name: str) -> bool:
    return re.search(rf"(?<![\w.'\"]){name}\b", source) is not None


def _message(codec: TextCodec, turn: Turn, form: _Form) -> dict[str, Any]:
    """A message as templates read it. Content parts are given in the form that the template reads."""
    content = turn.content
    if turn.tool_calls and not content:
        content = None
    told: dict[str, Any] = {"role": turn.role, "content": form.no_content if content is None else _parts(content)}
    if turn.name is not None:
        told["name"] = turn.name
    if turn.reasoning:
        known = [name for name in _REASONING if re.search(rf"[.'\"]{name}\b", codec.chat_template)]
        told.update(dict.fromkeys(known[:1], turn.reasoning))
    if turn.tool_calls:
        told["tool_calls"] = [_call(call, form) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        told["tool_call_id"] = turn.tool_call_id
    return told


def _parts(content: str | Sequence[str]) -> Any:
    return content if isinstance(content, str) else [{"type": "text", "text": text} for text in content]


def _call(call: ToolCall, form: _Form) -> dict[str, Any]:
    arguments = call.arguments if form.arguments_as_text else json.loads(call.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = dict(_NO_PARAMETERS if tool.parameters is None else tool.parameters)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}

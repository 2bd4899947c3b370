"""A conversation as the model's chat template writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import TextCodec
from paged_serving.conversation.turns import Conversation, Tool, ToolCall, Turn

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def render(codec: TextCodec, conversation: Conversation) -> str:
    """The prompt's text.

    Raises:
        InvalidRequestError: there is no chat template, it refuses the conversation, or it leaves out what the user
            says.
    """
    options: dict[str, Any] = dict(conversation.template_options)
    if conversation.tools and conversation.choice.mode != "none":
        options["tools"] = [_tool(each) for each in conversation.tools]
    if not conversation.opens_answer:
        options["add_generation_prompt"] = False
    if conversation.continues_last:
        options.update(add_generation_prompt=False, continue_final_message=True)
    return codec.render_chat([_message(turn) for turn in conversation.turns], **options)


def _message(turn: Turn) -> dict[str, Any]:
    """As templates read it. Of a content in parts the template gets the form that it reads."""
    content = turn.content
    parts = content if content is None or isinstance(content, str) else _parts(content)
    told: dict[str, Any] = {"role": turn.role, "content": parts}
    if turn.name is not None:
        told["name"] = turn.name
    if turn.tool_calls:
        told["tool_calls"] = [_call(call) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        told["tool_call_id"] = turn.tool_call_id
    return told


def _parts(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = dict(_NO_PARAMETERS if tool.parameters is None else tool.parameters)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}

"""What is wrong with a body is told by the field at fault, as its route spells it: in the text, and as ``param``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from hermes_model import SayingModel, hermes_tokenizer
from http_server import alphabet_server
from paged_core import EngineConfig
from paged_serving import RequestLimits

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}
TOOL = {"type": "function", "function": {"name": "f"}}
RESPONSE_TOOL = {"type": "function", "name": "f"}
OTHER_TOOL = {"type": "function", "name": "g"}
CLAUDE_TOOL = {"name": "f", "input_schema": {"type": "object"}}
LONG, MANY = "A" * 5000, ["a"] * 99
STRANGE = {"type": "strange"}


def called(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def allowed(name: str) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": name}}
    return {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool]}}


LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "A"},
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [USER], "max_tokens": 9},
    "/generate": {"inputs": "A"},
}
FAULTS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/completions": [
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", LONG]}, "prompt[1]"),
        ({"max_tokens": 3, "min_tokens": 7}, "min_tokens"),
        ({"max_tokens": 9999}, "max_tokens"),
        ({"max_tokens": 3000}, "max_tokens"),  # the cache is smaller: the engine's own word
        ({"best_of": 999}, "best_of"),
        ({"best_of": 100, "temperature": 1}, "best_of"),
        ({"n": 100, "temperature": 1}, "n"),
        ({"echo": True, "logprobs": 99}, "logprobs"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"guided_choice": []}, "guided_choice"),
    ],
    "/v1/chat/completions": [
        ({"messages": "x"}, "messages"),
        ({"messages": [USER, IMAGE]}, "messages[1].content[1].type"),
        ({"messages": [USER, {"role": "user", "content": 3}]}, "messages[1].content"),
        ({"messages": [called("[")]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [called(3)]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ({"tools": "x"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice.function.name"),
        ({"tools": [TOOL], "tool_choice": allowed("g")}, "tool_choice.allowed_tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": "x"}, "tool_choice"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"max_completion_tokens": 9999}, "max_completion_tokens"),
        ({"max_completion_tokens": 3000}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 9999}, "max_completion_tokens"),
        ({"max_tokens": 9999}, "max_tokens"),
        ({"max_completion_tokens": 3, "min_tokens": 7}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"stop": MANY}, "stop"),
    ],
    "/v1/responses": [
        ({"input": 3}, "input"),
        ({"input": [USER, {"role": "user", "content": [{"type": "input_image"}]}]}, "input[1].content[0].type"),
        ({"input": [USER, {"role": "user", "content": 3}]}, "input[1].content"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": LONG}, "input"),
        ({"max_output_tokens": 9999}, "max_output_tokens"),
        ({"max_output_tokens": 3000}, "max_output_tokens"),
        ({"max_output_tokens": 3, "min_tokens": 7}, "min_tokens"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"text": {"format": {"type": "x"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": STRANGE}}}, "text.format"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [RESPONSE_TOOL], "tool_choice": OTHER_TOOL}, "tool_choice.name"),
        ({"tools": [RESPONSE_TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [RESPONSE_TOOL], "tool_choice": {"type": "allowed_tools", "tools": [OTHER_TOOL]}},
         "tool_choice.tools"),
        ({"tools": [RESPONSE_TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ],
    "/v1/messages": [
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"max_tokens": 3, "min_tokens": 7}, "min_tokens"),
        ({"max_tokens": 3000}, "max_tokens"),
        ({"stop_sequences": MANY}, "stop_sequences"),
        ({"stop": MANY}, "stop"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [CLAUDE_TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tools": [CLAUDE_TOOL], "tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "x"}}, "thinking.type"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
    "/generate": [
        ({"inputs": LONG}, "inputs"),
        ({"parameters": {"max_new_tokens": 3000}}, "parameters.max_new_tokens"),
        ({"parameters": {"best_of": 100, "do_sample": True}}, "parameters.best_of"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    config = EngineConfig(num_blocks=256, attention_backend="reference")
    limits = RequestLimits(max_tokens=3500)
    with (
        alphabet_server(SayingModel(), tokenizer=hermes_tokenizer(), config=config, limits=limits) as server,
        server.client() as client,
    ):
        yield client


@pytest.mark.parametrize("path", FAULTS)
def test_the_field_at_fault_is_told_as_its_route_spells_it(client: httpx2.Client, path: str) -> None:
    for fields, field in FAULTS[path]:
        refused = client.post(path, json={**LEAST[path], **fields})
        assert refused.status_code == (422 if path == "/generate" else 400), (fields, refused.text)
        error = refused.json()["error"]
        told = error if path == "/generate" else error["message"]
        assert re.search(rf"(?<![\w.]){re.escape(field)}(?![\w.[])", told), (fields, told)
        if path not in ("/generate", "/v1/messages"):  # their errors have no place for it
            assert error["param"] == field, (fields, error)


def test_streams_are_refused_in_the_same_words(client: httpx2.Client) -> None:
    """What the engine alone can tell comes after the call was made, and before anything was sent."""
    for path, field in (("/v1/responses", "max_output_tokens"), ("/v1/chat/completions", "max_completion_tokens")):
        refused = client.post(path, json={**LEAST[path], field: 3000, "stream": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        assert f"lower {field}" in refused.json()["error"]["message"]

"""What OpenAI's two routes can't honour is refused by the field's name; what is no JSON is refused before."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calls import Alphabet
from openai_calls import chat, complete
from paged_serving import (
    CallError,
    ChatCall,
    CompletionCall,
    Failure,
    ProtocolError,
    RequestLimits,
    openai_error,
    parse_json,
)

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


LIMITS = RequestLimits(max_prompt_tokens=100, max_tokens=150, max_n=8, max_prompts=4, max_stop=4)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["A", 3]}, "prompt[1]"),
        ({"prompt": ["A"] * 5}, "prompt"),
        ({"prompt": "A" * 101}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0, "temperature": 1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 9}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 151}, "max_tokens"),
        ({"min_tokens": 7}, "min_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": list("abcde")}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "stop": "x"}, "stop"),
        ({"use_beam_search": True, "logprobs": 0}, "logprobs"),
        ({"use_beam_search": True, "logit_bias": {"1": 1}}, "logit_bias"),
        ({"use_beam_search": True, "guided_regex": "a+"}, "guided_regex"),
        ({"use_beam_search": True, "length_penalty": 21}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"priority": 1}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"colour": "red"}, "colour"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name(alphabet: Alphabet, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        complete(alphabet, **fields)
    status, body = openai_error(refused.value)
    assert (status, body["error"]["type"], body["error"]["param"]) == (400, "invalid_request_error", param)
    assert param.split(".")[-1] in body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "I first"}]}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt": "A"}, "prompt"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_a_chat_cannot_have_is_refused_by_its_name(alphabet: Alphabet, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        chat(alphabet, **fields)
    assert openai_error(refused.value)[1]["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_taken(alphabet: Alphabet) -> None:
    nothing = {"use_beam_search": False, "length_penalty": 1, "response_format": {"type": "text"}, "user": "u",
               "priority": 0, "suffix": None, "store": False, "stop": None, "logit_bias": {}, "best_of": 1,
               "top_p": 0, "temperature": 0, "typical_p": 1.0, "mirostat": 0, "request_id": "x"}  # fmt: skip
    assert complete(alphabet, **nothing)["choices"][0]["text"] == "BCDEF"
    more = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "metadata": {"a": "b"}, "echo": False}
    assert chat(alphabet, **more)["choices"][0]["message"]["content"] == ";<=>"


def test_tgis_placeholders_name_the_model_that_is_there(alphabet: Alphabet) -> None:
    assert chat(alphabet, model="tgi")["model"] == complete(alphabet, model="dummy")["model"] == "alphabet"


def test_an_unknown_model_is_not_found(alphabet: Alphabet) -> None:
    with pytest.raises(ProtocolError) as refused:
        complete(alphabet, model="gpt-9")
    status, body = openai_error(refused.value)
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert "alphabet, abc" in body["error"]["message"]


def test_priority_is_taken_where_the_policy_knows_it() -> None:
    alphabet = Alphabet(scheduling_policy="priority")
    with alphabet.engine:
        assert CompletionCall({"prompt": "A", "priority": -3}, alphabet.served, "1").params.priority == -3


def test_failures_have_a_status_of_their_own_and_tell_no_secrets() -> None:
    assert openai_error(CallError(Failure.OVERLOADED, "full"))[0] == 503
    status, body = openai_error(RuntimeError("/secret/path"))
    assert status == 500
    assert "secret" not in body["error"]["message"]


# ---- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff{}", b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a": "\\uD8Ab"}', b"[" * 100_000, b"1" * 5000],
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="JSON"):
        parse_json(raw)


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "n",
        "best_of",
        "temperature",
        "top_k",
        "top_p",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "logprobs",
        "logit_bias",
        "max_tokens",
        "min_tokens",
        "bad_words",
        "priority",
        "cache_salt",
        "truncate_prompt_tokens",
        "tools",
        "echo",
        "stop_token_ids",
    ]
)


@settings(max_examples=150)
@given(body=st.dictionaries(NAMES, JSON, max_size=5) | JSON, kind=st.sampled_from([ChatCall, CompletionCall]))
def test_any_body_is_either_a_call_or_refused(alphabet: Alphabet, body: Any, kind: Any) -> None:
    try:
        call = kind(json.loads(json.dumps(body)), alphabet.served, "1")
    except ProtocolError:
        return
    assert call.prompts

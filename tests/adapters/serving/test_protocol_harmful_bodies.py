"""Bodies made to do harm are refused by the name of the field at fault, or answered as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calls import Alphabet, chat, complete, generate
from paged_core import InvalidRequestError
from paged_serving import (
    ProtocolError,
    RequestLimits,
    openai_error,
    parse_json,
)

LIMITS = RequestLimits(max_prompt_tokens=100, max_n=64, max_values=2000)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "A", "prompt": "B"}',
        b'{"logit_bias": {"1": 1, "1": 2}}',
        b'{"\\ud800": 1, "\\ud800": 1}',
        b'{"\\udc00": 1}',
        b'{"a": {"b": ["\\uDFFF"]}}',
        b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}",
        b'{"a":' * 150 + b"1" + b"}" * 150,
        b'{"a": -Infinity}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_bodies_that_two_readers_could_read_differently_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="JSON") as refused:
        parse_json(raw)
    assert openai_error(refused.value)[0] == 400


def test_brackets_in_texts_are_no_depth() -> None:
    assert parse_json(json.dumps({"prompt": "[{" * 500}).encode()) == {"prompt": "[{" * 500}
    assert parse_json(json.dumps([[1, 2]] * 500).encode()) == [[1, 2]] * 500
    assert parse_json(b'"' + b"[" * 200 + b'"') == "[" * 200


NASTY = [True, False, -1, 0, 1.5, -0.0, 1e300, 1e999, 10**400, -(10**400), "", "\x00", "é" * 100, "9" * 5000, [], [[]],
         [None], [""], [0], [-1], [True], {}, {"": 1}, {"a": {}}, {"1": None}]  # fmt: skip
FIELDS = [
    "model", "prompt", "n", "best_of", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "bad_words",
    "allowed_token_ids", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "add_special_tokens",
    "return_token_ids", "cache_salt", "priority", "stream", "stream_options", "response_format",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "echo",
    "use_beam_search", "length_penalty", "early_stopping", "suffix", "user", "tools", "store", "metadata",
    "spaces_between_special_tokens",
]  # fmt: skip
CHAT = [
    "messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "chat_template", "tool_choice", "functions", "function_call", "modalities", "audio",
    "reasoning_effort", "parallel_tool_calls",
]  # fmt: skip
TGI = [
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed", "best_of", "repetition_penalty",
    "frequency_penalty", "stop", "truncate", "return_full_text", "details", "decoder_input_details",
    "top_n_tokens", "grammar", "watermark", "typical_p", "adapter_id",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_field_is_more_than_refused(alphabet: Alphabet, field: str) -> None:
    for value in NASTY:
        check(alphabet, lambda v=value: complete(alphabet, **{"max_tokens": 2, field: v}), field)
        if field not in ("prompt", "echo", "suffix"):
            check(alphabet, lambda v=value: chat(alphabet, **{"max_tokens": 2, field: v}), field)


@pytest.mark.parametrize("field", CHAT)
def test_no_value_of_a_chats_field_is_more_than_refused(alphabet: Alphabet, field: str) -> None:
    for value in NASTY:
        check(alphabet, lambda v=value: chat(alphabet, **{"max_tokens": 2, field: v}), field)


@pytest.mark.parametrize("field", TGI)
def test_no_value_of_tgis_fields_is_more_than_refused(alphabet: Alphabet, field: str) -> None:
    for value in NASTY:
        check(alphabet, lambda v=value: generate(alphabet, **{"max_new_tokens": 2, field: v}), field)


def check(alphabet: Alphabet, make: Any, field: str) -> None:
    """A call that is answered as JSON, or refused by the name of its field."""
    try:
        call = make()
    except ProtocolError as error:
        assert field in (error.param or "") or error.param == "messages"  # a template's word
        json.dumps(openai_error(error)[1], ensure_ascii=False, allow_nan=False).encode()
        return
    try:
        answer = alphabet.chunks(call) if call.stream else alphabet.answer(call)
    except InvalidRequestError as error:
        assert error.param is not None
        return
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()


def test_a_field_of_a_million_characters_is_not_repeated(alphabet: Alphabet) -> None:
    name = "x" * 1_000_000
    for fields in ({name: 1}, {"model": name}, {"n": name}, {"response_format": {name: 1}}):
        with pytest.raises(ProtocolError) as refused:
            complete(alphabet, **fields)
        assert len(json.dumps(openai_error(refused.value)[1])) < 500


def test_more_messages_than_the_model_has_places_are_refused_unread(alphabet: Alphabet) -> None:
    with pytest.raises(ProtocolError, match="messages holds 100000 objects; at most 256"):
        chat(alphabet, messages=[{}] * 100_000)


def test_parts_of_a_message_that_nobody_reads_are_refused(alphabet: Alphabet) -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    assert chat(alphabet, messages=[{"role": "user", "content": [part]}]).prompts[0].text == "user: Hi\nassistant:"
    with pytest.raises(ProtocolError) as refused:
        chat(alphabet, messages=[{"role": "user", "content": [{**part, "image_url": "x"}]}])
    assert refused.value.param == "messages[0].content[0].image_url"

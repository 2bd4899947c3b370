"""What one request may come to: fields that multiply, lists of token ids, and bodies made to do harm."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from calls import Alphabet
from paged_core import AsyncEngine, EngineConfig, EngineDeadError, InvalidRequestError
from paged_serving import (
    ChatCall,
    CompletionCall,
    ProtocolError,
    RequestLimits,
    ServedModel,
    TGICall,
    openai_error,
    parse_json,
    tgi_error,
    tokenize,
)
from toy_tokenizers import CharacterTokenizer

LIMITS = RequestLimits(max_prompt_tokens=100, max_n=64, max_values=2000)


def complete(alphabet: Alphabet, **fields: Any) -> CompletionCall:
    return CompletionCall({"prompt": "A", **fields}, alphabet.served, "1")


def chat(alphabet: Alphabet, **fields: Any) -> ChatCall:
    return ChatCall({"messages": [{"role": "user", "content": "Hi"}], **fields}, alphabet.served, "1")


def generate(alphabet: Alphabet, **parameters: Any) -> TGICall:
    return TGICall({"inputs": "A" * 50, "parameters": parameters}, alphabet.served)


def told(error: Exception) -> dict[str, Any]:
    status, body = openai_error(error)
    json.dumps(body, ensure_ascii=False).encode()
    assert status == 400
    found: dict[str, Any] = body["error"]
    return found


# ---- products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"logprobs": 9, "max_tokens": 201}, ["logprobs", "max_tokens", "n", "prompt"]),
        ({"logprobs": 0, "max_tokens": 100, "n": 21}, ["logprobs", "max_tokens", "n", "prompt"]),
        ({"max_tokens": 100, "n": 1, "best_of": 21}, ["logprobs", "max_tokens", "best_of", "prompt"]),
        ({"logprobs": 4, "max_tokens": 101, "prompt": ["A"] * 4}, ["logprobs", "max_tokens", "n", "prompt"]),
        ({"prompt_logprobs": 20, "prompt": "A" * 96}, ["prompt_logprobs", "n", "prompt"]),
        ({"prompt_logprobs": 0, "prompt": "A" * 96, "n": 21}, ["prompt_logprobs", "n", "prompt"]),
        ({"prompt_logprobs": 1, "prompt": ["A" * 96] * 11}, ["prompt_logprobs", "n", "prompt"]),
        ({"echo": True, "logprobs": 20, "prompt": "A" * 96, "max_tokens": 0}, ["logprobs", "n", "prompt"]),
        ({"echo": True, "prompt": "A" * 96, "n": 21}, ["echo", "n", "prompt"]),
        ({"return_token_ids": True, "prompt": "A" * 96, "n": 21}, ["return_token_ids", "n", "prompt"]),
        ({"allowed_token_ids": list(range(40)), "n": 51}, ["allowed_token_ids", "n", "prompt"]),
        ({"logit_bias": {str(i): 1 for i in range(90)}, "prompt": ["A"] * 23}, ["logit_bias", "n", "prompt"]),
        ({"stop_token_ids": list(range(90)), "best_of": 23}, ["stop_token_ids", "best_of", "prompt"]),
    ],
)
def test_fields_that_are_small_alone_are_bounded_together(
    alphabet: Alphabet, fields: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ProtocolError) as refused:
        complete(alphabet, **fields)
    error = told(refused.value)
    assert error["param"] == names[0]
    assert error["message"].startswith(f"{', '.join(names[:-1])} and {names[-1]} together come to ")
    assert "limit is 2000" in error["message"]


def test_what_just_fits_is_taken(alphabet: Alphabet) -> None:
    assert complete(alphabet, logprobs=9, max_tokens=200).params.logprobs == 9
    assert complete(alphabet, prompt_logprobs=19, prompt="A" * 100).prompts
    assert complete(alphabet, allowed_token_ids=list(range(40)), n=50).params.n == 50
    assert complete(alphabet, max_tokens=10_000, logprobs=3).params.max_tokens == 10_000  # the model ends at 256
    assert complete(alphabet, prompt="A" * 90, n=60).params.n == 60


def test_chats_and_tgis_calls_are_told_of_it_in_their_own_words(alphabet: Alphabet) -> None:
    with pytest.raises(ProtocolError, match="top_logprobs, max_completion_tokens, n and messages together") as refused:
        chat(alphabet, logprobs=True, top_logprobs=20, max_completion_tokens=150)
    assert told(refused.value)["param"] == "top_logprobs"
    with pytest.raises(ProtocolError, match="logprobs, max_tokens, n and messages together"):
        chat(alphabet, logprobs=True, max_tokens=150, n=20)
    named = "parameters.top_n_tokens, parameters.max_new_tokens, parameters.best_of and inputs together"
    with pytest.raises(ProtocolError, match=named):
        generate(alphabet, details=True, top_n_tokens=19, max_new_tokens=120)
    with pytest.raises(ProtocolError, match=r"parameters.decoder_input_details, parameters.best_of and inputs"):
        generate(alphabet, decoder_input_details=True, do_sample=True, best_of=41, max_new_tokens=10)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda a: complete(a, best_of=65), "best_of"),
        (lambda a: complete(a, n=65), "n"),
        (lambda a: complete(a, echo=True, logprobs=21), "logprobs"),
        (lambda a: chat(a, logprobs=True, top_logprobs=21), "top_logprobs"),
        (lambda a: generate(a, do_sample=True, best_of=65), "parameters.best_of"),
        (lambda a: generate(a, stop=["x"] * 17), "parameters.stop"),
        (lambda a: generate(a, details=True, top_n_tokens=21), "parameters.top_n_tokens"),
    ],
)
def test_a_limit_is_told_under_the_name_that_was_used(alphabet: Alphabet, make: Any, param: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        make(alphabet)
    assert told(refused.value)["param"] == param
    assert param in str(refused.value)


# ---- token ids ---------------------------------------------------------------------------------------------------


def test_ids_that_are_told_again_and_again_count_once(alphabet: Alphabet) -> None:
    params = complete(alphabet, allowed_token_ids=[5, 7] * 5000, stop_token_ids=[9] * 5000).params
    assert (params.allowed_token_ids, params.stop_token_ids) == ((5, 7), (9,))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [1, 97]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1, 1.5]}, "stop_token_ids[1]"),
        ({"logit_bias": {"97": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"prompt": [1, 97]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["A", 5]}, "prompt[1]"),
        ({"cache_salt": "s" * 1025}, "cache_salt"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_by_the_field_that_holds_them(
    alphabet: Alphabet, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ProtocolError) as refused:
        complete(alphabet, **fields)
    assert told(refused.value)["param"] == param


# ---- lengths -----------------------------------------------------------------------------------------------------


def test_what_is_tokenized_is_bounded_as_prompts_are(alphabet: Alphabet) -> None:
    for name in ("inputs", "prompt"):
        assert tokenize({name: "A" * 100}, alphabet.served)
        with pytest.raises(ProtocolError, match="101 tokens; at most 100") as refused:
            tokenize({name: "A" * 101}, alphabet.served)
        assert refused.value.param == name
    with pytest.raises(ProtocolError, match="prompt can't go with inputs"):
        tokenize({"inputs": "A", "prompt": "B"}, alphabet.served)


def test_a_prompt_cut_to_what_can_be_served_fits(alphabet: Alphabet) -> None:
    call = complete(alphabet, prompt="B" * 50 + "A" * 100, truncate_prompt_tokens=-1, max_tokens=1)
    assert call.prompts[0].text == "A" * 100
    assert alphabet.answer(call)["usage"]["prompt_tokens"] == 100


@pytest.mark.parametrize(
    ("prompt", "param", "why"),
    [
        (["A", "B" * 300, "C"], "prompt[1]", "has 300 tokens"),
        (["A", ""], "prompt[1]", "empty"),
        ([[33], [34, 500]], "prompt[1]", "holds token id 500"),
        ([[33], 34], "prompt[1]", "is a token id among texts or lists"),
        (["A", 1.5], "prompt[1]", "is 1.5; it must be a string, an integer or a list of integers"),
        ("B" * 300, "prompt", "has 300 tokens"),
    ],
)
def test_of_several_prompts_the_bad_one_is_told(alphabet: Alphabet, prompt: Any, param: str, why: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(why)) as refused:
        complete(alphabet, prompt=prompt)
    assert refused.value.param == param
    assert param in str(refused.value)


def test_what_the_engine_refuses_names_the_field() -> None:
    alphabet = Alphabet(RequestLimits(max_n=600))
    small = EngineConfig(num_blocks=4, block_size=16, attention_backend="reference")
    tight = AsyncEngine(AlphabetModel(), tokenizer=CharacterTokenizer(), config=small)
    with alphabet.engine, tight:
        served = ServedModel(tight, ["tight"])
        with pytest.raises(ProtocolError, match="prompt has 65 tokens; at most 64") as refused:
            CompletionCall({"prompt": "A" * 65}, served, "1")
        assert refused.value.param == "prompt"
        for body, param in (({"prompt": "A" * 60, "max_tokens": 9}, "max_tokens"), ({"prompt": "A", "n": 70}, "n")):
            call = CompletionCall(body, served, "1")
            with pytest.raises(InvalidRequestError) as unfit:
                tight.submit(call.prompts[0], call.params).result(30)
            assert told(unfit.value)["param"] == param


def test_a_stopped_engine_is_unavailable_and_not_a_fault_of_the_server(alphabet: Alphabet) -> None:
    for status, body in (openai_error(EngineDeadError("/secret")), tgi_error(EngineDeadError("/secret"))):
        assert status == 503
        assert "restarted" in str(body)
        assert "secret" not in str(body)


# ---- work off the event loop -------------------------------------------------------------------------------------


def test_bad_words_are_spelt_once_a_request_and_before_it_is_submitted() -> None:
    spelt: list[str] = []

    class Noting(CharacterTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            spelt.append(text)
            return super().encode(text, add_special_tokens=add_special_tokens)

        def __deepcopy__(self, memo: Any) -> Noting:
            return self

    config = EngineConfig(num_blocks=64, attention_backend="reference")
    engine = AsyncEngine(AlphabetModel(), tokenizer=Noting(), config=config)
    with engine:
        served = ServedModel(engine, ["alphabet"])
        bodies = {"bad_words": ["B", "xyz"], "max_tokens": 1, "temperature": 0}
        call = CompletionCall({"prompt": ["A", "A", "A"], **bodies}, served, "1")
        ChatCall({"messages": [{"role": "user", "content": "Hi"}], **bodies}, served, "1")
        assert sorted(spelt).count("xyz") == sorted(spelt).count(" xyz") == 2
        spelt.clear()
        results = [engine.submit(prompt, call.params).result(30) for prompt in call.prompts]
        assert spelt == []
        assert all(result.outputs[0].text != "B" for result in results)


def test_prompts_of_one_request_share_what_finds_their_stop_strings(
    alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_core.text.stop_strings import StopStrings

    built: list[Any] = []

    def build(self: StopStrings, strings: Any) -> None:
        built.append(strings)
        original(self, strings)

    original = StopStrings.__init__
    monkeypatch.setattr(StopStrings, "__init__", build)
    call = complete(alphabet, prompt=["A"] * 8, stop=["DEF", "x" * 10_000], temperature=0)
    streams = [alphabet.engine.submit(prompt, call.params) for prompt in call.prompts]
    assert [stream.result(30).outputs[0].text for stream in streams] == ["BC"] * 8
    assert len(built) < 8


# ---- bodies ------------------------------------------------------------------------------------------------------


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
    told(refused.value)


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

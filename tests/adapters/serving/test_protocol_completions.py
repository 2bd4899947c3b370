"""OpenAI's two routes without HTTP: each field is honoured or refused by name, and answers have the known shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calls import Alphabet
from paged_core import InvalidRequestError
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


@pytest.fixture(scope="module")
def alphabet() -> Iterator[Alphabet]:
    alphabet = Alphabet(RequestLimits(max_prompt_tokens=100, max_tokens=150, max_n=8, max_prompts=4, max_stop=4))
    with alphabet.engine:
        yield alphabet


def complete(alphabet: Alphabet, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "A", "max_tokens": 5, "temperature": 0, **fields}
    return alphabet.answer(CompletionCall(body, alphabet.served, "1"))


def stream(alphabet: Alphabet, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "A", "max_tokens": 5, "temperature": 0, "stream": True, **fields}
    return alphabet.chunks(CompletionCall(body, alphabet.served, "1"))


def chat(alphabet: Alphabet, **fields: Any) -> dict[str, Any]:
    return alphabet.answer(ChatCall(chat_body(**fields), alphabet.served, "1"))


def chat_stream(alphabet: Alphabet, **fields: Any) -> list[dict[str, Any]]:
    return alphabet.chunks(ChatCall(chat_body(**fields, stream=True), alphabet.served, "1"))


def chat_body(**fields: Any) -> dict[str, Any]:
    # The toy template ends with "assistant:", which the model continues from ":".
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, **fields}


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] for choice in choices)


# ---- completions -------------------------------------------------------------------------------------------------


def test_a_completion_has_openais_shape(alphabet: Alphabet) -> None:
    answer = complete(alphabet)
    assert (answer["id"], answer["object"], answer["model"]) == ("cmpl-1", "text_completion", "alphabet")
    assert answer["choices"] == [
        {"index": 0, "text": "BCDEF", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 5,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("A", ["BC"]), (["A", "X"], ["BC", "YZ"]), ([33, 34], ["CD"]), ([[33], [34, 35]], ["BC", "DE"])],
)
def test_prompts_may_have_four_forms(alphabet: Alphabet, prompt: Any, texts: list[str]) -> None:
    answer = complete(alphabet, prompt=prompt, max_tokens=2)
    assert [choice["text"] for choice in answer["choices"]] == texts
    chunks = stream(alphabet, prompt=prompt, max_tokens=2)
    assert [joined(chunks, index) for index in range(len(texts))] == texts


def test_choices_are_numbered_over_prompts_and_samples(alphabet: Alphabet) -> None:
    answer = complete(alphabet, prompt=["A", "M"], n=2, temperature=1, max_tokens=1)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "B"), (1, "B"), (2, "N"), (3, "N"),
    ]  # fmt: skip


def test_no_nucleus_may_be_asked_for_where_nothing_is_drawn(alphabet: Alphabet) -> None:
    assert complete(alphabet, top_p=0)["choices"][0]["text"] == "BCDEF"
    assert chat(alphabet, top_p=0.0)["choices"][0]["message"]["content"] == ";<=>"


def test_stop_strings_of_any_length_are_not_taken(alphabet: Alphabet) -> None:
    with pytest.raises(ProtocolError, match="the texts of stop are longer than 16384 characters together"):
        complete(alphabet, stop="a" * 20_000)


def test_a_stop_string_and_a_stop_token_are_told_apart(alphabet: Alphabet) -> None:
    (choice,) = complete(alphabet, stop=["DE", "x"], max_tokens=20)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("BC", "stop", "DE")
    (choice,) = complete(alphabet, stop="D", include_stop_str_in_output=True, max_tokens=20)["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("BCD", "D")
    (choice,) = complete(alphabet, stop_token_ids=[36], max_tokens=20)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("BC", "stop", 36)
    (choice,) = complete(alphabet, prompt="}", max_tokens=20)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("~\x7f", "stop", None)


def test_logprobs_of_completions_come_as_parallel_lists(alphabet: Alphabet) -> None:
    logprobs = complete(alphabet, max_tokens=2, logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["B", "C"]
    assert logprobs["token_logprobs"] == pytest.approx([0, 0], abs=1e-3)
    assert [list(top) for top in logprobs["top_logprobs"]] == [["B"], ["C"]]
    assert logprobs["text_offset"] == [0, 1]
    forced = complete(alphabet, max_tokens=1, logprobs=1, allowed_token_ids=[80])["choices"][0]["logprobs"]
    assert list(forced["top_logprobs"][0]) == ["p", "B"]  # the chosen one beside the likeliest


def test_echo_puts_the_prompt_and_its_logprobs_before_the_answer(alphabet: Alphabet) -> None:
    (choice,) = complete(alphabet, prompt="AB", echo=True, logprobs=1, max_tokens=2)["choices"]
    assert choice["text"] == "ABCD"
    assert choice["logprobs"]["tokens"] == ["A", "B", "C", "D"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx([0, 0, 0], abs=1e-3)
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert "prompt_logprobs" not in choice


def test_echo_of_nothing_but_the_prompt_scores_it(alphabet: Alphabet) -> None:
    answer = complete(alphabet, prompt=[33, 35], echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("AC", "length")
    assert choice["logprobs"]["tokens"] == ["A", "C"]
    assert choice["logprobs"]["token_logprobs"][1] == pytest.approx(-50, abs=0.1)
    assert answer["usage"]["completion_tokens"] == 0
    assert joined(stream(alphabet, prompt="AC", echo=True, max_tokens=0)) == "AC"


def test_echo_streams_too(alphabet: Alphabet) -> None:
    chunks = stream(alphabet, prompt="AB", echo=True, logprobs=0, n=2, temperature=1, max_tokens=3)
    for index in range(2):
        assert joined(chunks, index) == "ABCDE"
        pieces = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [token for piece in pieces for token in piece["tokens"]] == list("ABCDE")
        assert [offset for piece in pieces for offset in piece["text_offset"]] == [0, 1, 2, 3, 4]


def test_prompt_logprobs_have_vllms_shape(alphabet: Alphabet) -> None:
    (choice,) = complete(alphabet, prompt="AC", prompt_logprobs=1, max_tokens=1)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert [(token, found["rank"], found["decoded_token"]) for token, found in second.items()] == [
        ("35", second["35"]["rank"], "C"),
        ("34", 1, "B"),
    ]


def test_best_of_returns_the_likeliest_samples_and_bills_all(alphabet: Alphabet) -> None:
    # One letter in about a thousand is wrong at this temperature, and then the mean logprob tells.
    answer = complete(alphabet, best_of=8, n=2, temperature=12, seed=5, max_tokens=4)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 32
    every = complete(alphabet, n=8, temperature=12, seed=5, max_tokens=4, logprobs=0)["choices"]
    ranked = sorted(every, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]), reverse=True)
    assert len({choice["text"] for choice in every}) > 1
    assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert answer["choices"][0]["logprobs"] is None


def test_a_seed_gives_the_same_samples_again(alphabet: Alphabet) -> None:
    first, second = (complete(alphabet, temperature=14, seed=3, n=3)["choices"] for _ in range(2))
    assert first == second
    assert len({choice["text"] for choice in first}) == 3


def test_bias_bans_and_penalties_reach_the_engine(alphabet: Alphabet) -> None:
    assert complete(alphabet, logit_bias={"80": 100}, max_tokens=1)["choices"][0]["text"] == "p"
    assert complete(alphabet, bad_words=["B"], max_tokens=1)["choices"][0]["text"] != "B"
    assert complete(alphabet, prompt="}", ignore_eos=True, max_tokens=9)["usage"]["completion_tokens"] == 9
    assert complete(alphabet, prompt="}", min_tokens=7, max_tokens=9)["usage"]["completion_tokens"] >= 7


def test_prompts_are_cut_from_the_left(alphabet: Alphabet) -> None:
    answer = complete(alphabet, prompt="ABCXYM", truncate_prompt_tokens=2, max_tokens=1, echo=True)
    assert answer["choices"][0]["text"] == "YMN"
    assert answer["usage"]["prompt_tokens"] == 2
    with pytest.raises(InvalidRequestError, match="ids go from"):
        complete(alphabet, prompt=[33, -(10**30), 33], truncate_prompt_tokens=2)
    assert complete(alphabet, prompt="A", truncate_prompt_tokens=-1)["choices"][0]["text"] == "BCDEF"


def test_token_ids_are_returned_if_asked_for(alphabet: Alphabet) -> None:
    (choice,) = complete(alphabet, return_token_ids=True, max_tokens=2)["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([33], [34, 35])
    chunks = stream(alphabet, return_token_ids=True, max_tokens=3)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [token for choice in choices for token in choice["token_ids"]] == [34, 35, 36]
    assert choices[0]["prompt_token_ids"] == [33]


def test_a_stream_is_the_answer_in_pieces(alphabet: Alphabet) -> None:
    chunks = stream(alphabet, n=3, temperature=1, max_tokens=40, logprobs=0)
    for index in range(3):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices).startswith("BCDEF")
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_is_streamed_if_asked_for(alphabet: Alphabet) -> None:
    *chunks, last = stream(alphabet, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)
    every = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream(alphabet, stream_options=every)]
    assert counts == sorted(counts)
    assert counts[-1] == 5


# ---- chat --------------------------------------------------------------------------------------------------------


def test_a_chat_answer_has_openais_shape(alphabet: Alphabet) -> None:
    answer = chat(alphabet, model="abc")
    assert (answer["id"], answer["object"], answer["model"]) == ("chatcmpl-1", "chat.completion", "abc")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ";<=>", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len("user: Hi assistant:")


def test_a_chat_stream_says_who_speaks_then_what(alphabet: Alphabet) -> None:
    first, *others, last = chat_stream(alphabet, stream_options={"include_usage": True}, logprobs=True)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in others) == ";<=>"
    assert others[-1]["choices"][0]["finish_reason"] == "length"
    tokens = [entry["token"] for chunk in others for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == list(";<=>")
    assert [first["usage"], last["choices"], last["usage"]["completion_tokens"]] == [None, [], 4]


def test_chat_logprobs_come_with_bytes_and_the_likeliest(alphabet: Alphabet) -> None:
    logprobs = chat(alphabet, logprobs=True, top_logprobs=2, max_tokens=1)["choices"][0]["logprobs"]
    (entry,) = logprobs["content"]
    assert (entry["token"], entry["bytes"]) == (";", [ord(";")])
    assert entry["top_logprobs"][0]["token"] == ";"
    assert len(entry["top_logprobs"]) == 2
    assert chat(alphabet, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_text_parts_are_one_content(alphabet: Alphabet) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]
    messages = [{"role": "user", "content": parts, "name": "Ann"}]
    answer = chat(alphabet, messages=messages)
    assert answer["usage"]["prompt_tokens"] == len("user: a bc assistant:")
    call = ChatCall(chat_body(messages=messages), alphabet.served, "1")
    assert call.prompts[0].text == "user: a\nbc\nassistant:"


def test_max_completion_tokens_goes_before_max_tokens(alphabet: Alphabet) -> None:
    assert chat(alphabet, max_completion_tokens=2)["usage"]["completion_tokens"] == 2
    body = {key: value for key, value in chat_body().items() if key != "max_tokens"}
    assert ChatCall(body, alphabet.served, "1").params.max_tokens == alphabet.served.limits.max_tokens


def test_an_answer_may_be_begun_by_the_caller(alphabet: Alphabet) -> None:
    call = ChatCall(chat_body(add_generation_prompt=False), alphabet.served, "1")
    assert call.prompts[0].text == "user: Hi\n"


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["A", 3]}, "prompt"),
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
        ({"stop": [""]}, "stop"),
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


# ---- streams come to what is told at once ------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    prompts=st.lists(st.text("ABCXYZ", min_size=1, max_size=9), min_size=1, max_size=3),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 3),
            "echo": st.booleans(),
            "logprobs": st.integers(0, 3),
            "prompt_logprobs": st.integers(0, 3),
            "max_tokens": st.integers(1, 6),
            "stop": st.sampled_from(["D", "EFG", ["ABC", "Z"]]),
            "return_token_ids": st.booleans(),
            "seed": st.integers(0, 9),
        },
    ),
)
def test_a_stream_comes_to_the_plain_answer(alphabet: Alphabet, prompts: list[str], fields: dict[str, Any]) -> None:
    asked = {"prompt": prompts, "temperature": 14, "seed": 1, **fields}
    plain, chunks = complete(alphabet, **asked), stream(alphabet, **asked, stream_options={"include_usage": True})
    assert [choice["index"] for choice in plain["choices"]] == list(range(len(prompts) * fields.get("n", 1)))
    for choice in plain["choices"]:
        pieces = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
        assert pieces[-1]["stop_reason"] == choice["stop_reason"]
        for name in ("prompt_logprobs", "prompt_token_ids"):
            assert pieces[0].get(name) == choice.get(name)
        if "logprobs" in fields:
            for name, told in choice["logprobs"].items():
                assert [each for piece in pieces for each in piece["logprobs"][name]] == told
        if fields.get("return_token_ids"):
            assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
    assert [chunk.get("usage") for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert all(chunks[-1]["usage"][name] == plain["usage"][name] for name in counts)


def test_prompt_logprobs_of_a_chat_stream_come_with_its_first_news(alphabet: Alphabet) -> None:
    plain = chat(alphabet, prompt_logprobs=1, n=2, temperature=1)
    chunks = chat_stream(alphabet, prompt_logprobs=1, n=2, temperature=1)
    told = [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk]
    assert told == [plain["prompt_logprobs"]]

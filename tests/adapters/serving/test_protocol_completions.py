"""OpenAI's completions without HTTP: each field is honoured, and answers and streams have the known shapes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calls import Alphabet
from openai_calls import chat, complete, joined, stream
from paged_core import InvalidRequestError
from paged_serving import (
    ProtocolError,
    RequestLimits,
)

LIMITS = RequestLimits(max_prompt_tokens=100, max_tokens=150, max_n=8, max_prompts=4, max_stop=4)


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

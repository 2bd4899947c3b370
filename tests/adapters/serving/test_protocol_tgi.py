"""TGI's routes without HTTP: fields honoured or refused by name, shapes as its clients read them."""

from __future__ import annotations

from typing import Any

import pytest

from alphabet_model import AlphabetModel
from calls import Alphabet
from paged_core import AsyncEngine, CompletionOutput, GenerationOutput, InvalidRequestError, Logprob, StreamDelta
from paged_serving import CallError, Failure, ProtocolError, RequestLimits, ServedModel, TGICall, tgi_error
from toy_tokenizers import SentencePieceTokenizer

LIMITS = RequestLimits(max_tokens=150, max_n=4, max_stop=4)


def call(alphabet: Alphabet, inputs: Any = "A", stream: bool | None = False, **parameters: Any) -> TGICall:
    return TGICall({"inputs": inputs, "parameters": {"max_new_tokens": 3, **parameters}}, alphabet.served, stream)


def generate(alphabet: Alphabet, inputs: Any = "A", **parameters: Any) -> dict[str, Any]:
    return alphabet.answer(call(alphabet, inputs, **parameters))


def stream(alphabet: Alphabet, inputs: str = "A", **parameters: Any) -> list[dict[str, Any]]:
    return alphabet.chunks(call(alphabet, inputs, True, **parameters))


def test_an_answer_is_text_alone_unless_details_are_asked_for(alphabet: Alphabet) -> None:
    assert generate(alphabet) == {"generated_text": "BCD"}
    assert alphabet.answer(call(alphabet, stream=None)) == [{"generated_text": "BCD"}]
    assert generate(alphabet, return_full_text=True) == {"generated_text": "ABCD"}


def test_details_hold_every_token(alphabet: Alphabet) -> None:
    details = generate(alphabet, details=True)["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 3, None)
    assert details["prefill"] == []
    assert [(token["id"], token["text"], token["special"]) for token in details["tokens"]] == [
        (34, "B", False), (35, "C", False), (36, "D", False),
    ]  # fmt: skip
    assert all(token["logprob"] == pytest.approx(0, abs=1e-3) for token in details["tokens"])
    assert "top_tokens" not in details


def test_the_prompt_is_told_as_prefill(alphabet: Alphabet) -> None:
    details = generate(alphabet, "AC", details=True, decoder_input_details=True)["details"]
    first, second = details["prefill"]
    assert first == {"id": 33, "text": "A", "logprob": None}
    assert (second["text"], second["logprob"]) == ("C", pytest.approx(-50, abs=0.1))


def test_the_likeliest_tokens_stand_beside_each(alphabet: Alphabet) -> None:
    details = generate(alphabet, details=True, top_n_tokens=2)["details"]
    assert [tops[0]["text"] for tops in details["top_tokens"]] == ["B", "C", "D"]
    assert {len(tops) for tops in details["top_tokens"]} == {2}
    assert [chunk["top_tokens"][0]["text"] for chunk in stream(alphabet, top_n_tokens=2)] == ["B", "C", "D"]


def test_every_streamed_token_is_a_chunk_and_the_last_has_the_whole(alphabet: Alphabet) -> None:
    chunks = stream(alphabet, details=True, return_full_text=True)
    assert [(chunk["index"], chunk["token"]["text"]) for chunk in chunks] == [(1, "B"), (2, "C"), (3, "D")]
    assert [chunk["generated_text"] for chunk in chunks] == [None, None, "ABCD"]
    assert [chunk["details"] for chunk in chunks[:-1]] == [None, None]
    assert chunks[-1]["details"] == {"finish_reason": "length", "generated_tokens": 3, "input_length": 1, "seed": None}
    assert stream(alphabet)[-1]["details"] is None


def test_a_stop_string_stays_in_the_text_and_eos_is_a_special_token(alphabet: Alphabet) -> None:
    answer = generate(alphabet, stop=["D"], details=True, max_new_tokens=20)
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("BCD", "stop_sequence")
    answer = generate(alphabet, "}", details=True, max_new_tokens=20)
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("~\x7f", "eos_token")
    assert answer["details"]["tokens"][-1]["text"] == "<eos>"
    assert answer["details"]["tokens"][-1]["special"] is True
    (*_, last) = stream(alphabet, "}", max_new_tokens=20)
    assert (last["token"]["special"], last["generated_text"]) == (True, "~\x7f")


def test_sampling_is_on_as_soon_as_a_parameter_asks_for_it(alphabet: Alphabet) -> None:
    assert call(alphabet).params.greedy
    assert call(alphabet, temperature=1.0).params.greedy
    for asked in ({"do_sample": True}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
        params = call(alphabet, **asked).params
        assert not params.greedy
        assert params.seed is not None, "the seed that is told must be the one that was used"
    assert generate(alphabet, do_sample=True, seed=7, details=True)["details"]["seed"] == 7


def test_best_of_tells_the_others_too(alphabet: Alphabet) -> None:
    answer = generate(alphabet, best_of=3, temperature=12.0, seed=1, details=True)
    others = answer["details"]["best_of_sequences"]
    sums = [sum(token["logprob"] for token in each["tokens"]) for each in (answer["details"], *others)]
    assert len(others) == 2
    assert sums[0] == max(sums)


def test_inputs_are_cut_from_the_left(alphabet: Alphabet) -> None:
    assert generate(alphabet, "AXM", truncate=1, return_full_text=True) == {"generated_text": "MNOP"}


def test_the_limit_of_new_tokens_is_tgis_unless_said(alphabet: Alphabet) -> None:
    assert TGICall({"inputs": "A"}, alphabet.served, False).params.max_tokens == 100


def test_post_root_streams_if_the_body_says_so(alphabet: Alphabet) -> None:
    assert TGICall({"inputs": "A", "stream": True}, alphabet.served).stream
    assert not TGICall({"inputs": "A"}, alphabet.served).stream


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"temperature": 0}, "parameters.temperature"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"max_new_tokens": 151}, "parameters.max_new_tokens"),
        ({"best_of": 2}, "parameters.best_of"),
        ({"best_of": 5, "do_sample": True}, "parameters.best_of"),
        ({"top_n_tokens": 21, "details": True}, "parameters.top_n_tokens"),
        ({"stop": list("abcde")}, "parameters.stop"),
        ({"watermark": True}, "parameters.watermark"),
        ({"typical_p": 0.5}, "parameters.typical_p"),
        ({"grammar": {"type": "regex", "value": {}}}, "parameters.grammar"),
        ({"grammar": {"type": "regex", "value": "["}}, "parameters.grammar"),
        ({"grammar": {"type": "xml", "value": "a"}}, "parameters.grammar"),
        ({"adapter_id": "mine"}, "parameters.adapter_id"),
        ({"colour": "red"}, "parameters.colour"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name(alphabet: Alphabet, parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        generate(alphabet, **parameters)
    assert refused.value.param == param
    status, body = tgi_error(refused.value)
    assert (status, body["error_type"]) == (422, "validation")
    assert param in body["error"]


def test_what_cannot_be_streamed_is_refused(alphabet: Alphabet) -> None:
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        with pytest.raises(ProtocolError, match="can't be streamed"):
            stream(alphabet, **parameters)


@pytest.mark.parametrize(
    "body", [[], {}, {"inputs": 3}, {"inputs": ""}, {"inputs": "A" * 300}, {"inputs": "A", "x": 1}]
)
def test_a_body_without_an_input_that_can_be_served_is_refused(alphabet: Alphabet, body: Any) -> None:
    with pytest.raises(ProtocolError):
        TGICall(body, alphabet.served, False)


def test_failures_have_tgis_names() -> None:
    assert tgi_error(CallError(Failure.OVERLOADED, "full")) == (429, {"error": "full", "error_type": "overloaded"})
    assert tgi_error(CallError(Failure.GENERATION, "nan"))[0] == 424
    assert tgi_error(CallError(Failure.CUT, "end"))[1]["error_type"] == "incomplete_generation"


def test_tokens_that_came_as_one_delta_are_told_apart_and_their_texts_make_the_whole() -> None:
    """A slow reader's news are joined; a character of several byte tokens is whole only with its last."""
    tokenizer = SentencePieceTokenizer()
    engine = AsyncEngine(AlphabetModel(), tokenizer=tokenizer, num_blocks=16, attention_backend="reference")
    ids = [259, *tokenizer.byte_ids("日本"), 260, 1]
    text, entries = "Hello日本 world", [{token: Logprob(-1.0, 1)} for token in ids]
    served = ServedModel(engine, ["toy"])

    streaming = TGICall({"inputs": "x", "parameters": {"details": True}}, served, True)
    first = StreamDelta("r", 0, "Hello", ids[:2], entries[:2])
    second = StreamDelta("r", 0, text[5:], ids[2:], entries[2:], finish_reason="stop")
    chunks = streaming.chunks(0, first) + streaming.chunks(0, second)
    assert [chunk["token"]["id"] for chunk in chunks] == ids
    assert "".join(chunk["token"]["text"] for chunk in chunks if not chunk["token"]["special"]) == text
    assert [chunk["token"]["text"] for chunk in chunks[:4]] == ["Hello", "", "", "日"]
    assert chunks[-1]["token"] == {"id": 1, "text": "</s>", "logprob": -1.0, "special": True}
    assert chunks[-1]["generated_text"] == text

    plain = TGICall({"inputs": "x", "parameters": {"details": True}}, served, False)
    output = CompletionOutput(0, text, ids, entries, -len(ids), "stop")
    answer = plain.answer([GenerationOutput("r", "x", [0], [output])])
    assert "".join(token["text"] for token in answer["details"]["tokens"][:-1]) == text

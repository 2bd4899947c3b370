"""What one request may come to: fields that multiply, lists of token ids, and lengths."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from alphabet_model import AlphabetModel
from calls import Alphabet, chat, complete, generate
from paged_core import AsyncEngine, EngineConfig, EngineDeadError, InvalidRequestError
from paged_serving import (
    ChatCall,
    CompletionCall,
    ProtocolError,
    RequestLimits,
    ServedModel,
    openai_error,
    tgi_error,
    tokenize,
)
from toy_tokenizers import CharacterTokenizer

LIMITS = RequestLimits(max_prompt_tokens=100, max_n=64, max_values=2000)


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

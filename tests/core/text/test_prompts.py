"""What may stand for a prompt, and what only looks like one: honoured or refused, never completed as something else."""

from __future__ import annotations

from array import array
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from alphabet_model import AlphabetModel
from case_ids import told
from paged_core import LLM, AsyncEngine, InvalidRequestError, SamplingParams
from paged_core.text.codec import Prompt, TextCodec
from paged_core.text.prompts import as_conversations, as_prompts, encode_prompt
from toy_tokenizers import CharacterTokenizer

CODEC = TextCodec(CharacterTokenizer())
A, B, C = 33, 34, 35  # the characters' token ids
HI = {"role": "user", "content": "Hi"}
GREEDY = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(AlphabetModel(), tokenizer=CharacterTokenizer(), num_blocks=64, attention_backend="reference")
    yield llm
    llm.close()


def padded(**more: Any) -> UserDict[str, Any]:
    """What a tokenizer makes of "A" and "ABC": a BatchEncoding is a UserDict too."""
    return UserDict(input_ids=[[0, 0, A], [A, B, C]], attention_mask=[[0, 0, 1], [1, 1, 1]], **more)


def tensors(**more: Any) -> UserDict[str, Any]:
    return UserDict({name: torch.tensor(value) for name, value in padded().items()}, **more)


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ({"prompt": "A"}, ["BC"]),
        ([{"prompt": "A"}, {"prompt": "M"}], ["BC", "NO"]),
        ({"prompt_token_ids": [A]}, ["BC"]),
        ([{"prompt_token_ids": [A]}, "A", {"prompt_token_ids": np.array([B])}], ["BC", "BC", "CD"]),
        ({"prompt": "any text", "prompt_token_ids": [A], "multi_modal_data": None}, ["BC"]),
        (padded(), ["BC", "DE"]),
        (dict(padded(token_type_ids=[[0] * 3] * 2)), ["BC", "DE"]),
        (tensors(), ["BC", "DE"]),
        ({"input_ids": [A, B]}, ["CD"]),
        ({"input_ids": [[A], [A, B]]}, ["BC", "CD"]),
        ([{"input_ids": [A], "attention_mask": [1]}, {"input_ids": torch.tensor([[B]])}], ["BC", "CD"]),
        (HI, [";<"]),
        ([HI], [";<"]),
        ([[HI], [HI, HI]], [";<", ";<"]),
        (torch.tensor([A, B]), ["CD"]),
        (np.array([[A], [B]]), ["BC", "CD"]),
        ([torch.tensor([A]), np.array([B])], ["BC", "CD"]),
        ([np.int64(A), torch.tensor(B)], ["CD"]),
        (array("i", [A, B]), ["CD"]),
        (("A", "M"), ["BC", "NO"]),
        (iter(["A", "M"]), ["BC", "NO"]),
        (np.array(["A", "M"]), ["BC", "NO"]),
        (Prompt("A", [B]), ["CD"]),
        ([], []),
    ],
    ids=lambda value: told(value)[:40],
)
def test_every_form_that_people_know_is_completed(llm: LLM, prompts: Any, texts: list[str]) -> None:
    outputs = llm.generate(prompts, GREEDY)
    assert [output.error for output in outputs] == [None] * len(texts)
    assert [output.outputs[0].text for output in outputs] == texts


@pytest.mark.parametrize("encoded", [padded(), tensors(), dict(padded())])
def test_a_tokenizers_padding_is_no_part_of_a_prompt(llm: LLM, encoded: Any) -> None:
    assert as_prompts(encoded) == [[A], [A, B, C]]
    assert [output.prompt_token_ids for output in llm.generate(encoded, GREEDY)] == [[A], [A, B, C]]
    one = {"input_ids": [[0, A, B, 0]], "attention_mask": torch.tensor([[0, 1, 1, 0]])}
    assert encode_prompt(CODEC, one).token_ids == [A, B]


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (None, "NoneType"),
        (5, "int"),
        (b"AB", "bytes"),
        (bytearray(b"AB"), "bytearray"),
        (memoryview(b"AB"), "memoryview"),
        ({"A", "M"}, "set"),
        (object(), "object"),
        ({"input_ids": [[A]], "pixel_values": [1]}, "pixel_values beside input_ids; only text"),
        ({"input_ids": [[A, B]], "attention_mask": [[1]]}, "different sizes"),
        ({"input_ids": "AB"}, "input_ids is of type str"),
        ({"input_ids": [["A"]]}, "input_ids holds 'A'"),
    ],
)
def test_what_is_no_prompt_is_refused_at_once(llm: LLM, prompts: Any, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ({"text": "A"}, "a dict with 'text'; give a string"),
        ({}, "a dict with nothing"),
        ({"prompt": None}, "a dict with nothing"),
        ({"prompt": [A]}, "'prompt' is of type list; it must be a string"),
        ({"prompt_token_ids": "A"}, "prompt_token_ids is of type str"),
        ({"prompt_token_ids": b"A"}, "prompt_token_ids is of type bytes"),
        ({"prompt": "A", "multi_modal_data": {"image": 1}}, "a dict with 'multi_modal_data'"),
        ({"prompt": "A", "cache_salt": "x"}, "a dict with 'cache_salt'"),
        ({"prompt_embeds": [1.0]}, "a dict with 'prompt_embeds'"),
        ({"content": "A"}, "a dict with 'content'"),
        (["A", "B"], "holds 'A', which is neither a token id nor a chat message"),
        ([True], "holds True"),
        ([1.5], "holds 1.5"),
        ([[A]], r"holds \[33\]"),
        (b"A", "bytes"),
        (None, "NoneType"),
        (padded(), "input_ids holds 2 prompts"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_among_others_it_is_refused_by_itself(llm: LLM, prompt: Any, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        encode_prompt(CODEC, prompt)
    first, refused, last = llm.generate(["A", prompt, "M"], GREEDY)
    assert (first.outputs[0].text, last.outputs[0].text) == ("BC", "NO")
    assert refused.error is not None and refused.outputs[0].token_ids == ()


def test_a_dict_by_itself_is_one_prompt_and_no_list_of_names(llm: LLM) -> None:
    (refused,) = llm.generate({"text": "A", "name": "B"}, GREEDY)
    assert refused.error is not None and "'text', 'name'" in refused.error


def test_an_async_engine_takes_the_same_forms() -> None:
    fields: dict[str, Any] = {"num_blocks": 64, "attention_backend": "reference"}
    with AsyncEngine(AlphabetModel(), tokenizer=CharacterTokenizer(), **fields) as engine:
        for prompt in ({"prompt": "AB"}, {"prompt_token_ids": [A, B]}, {"input_ids": [[0, A, B]],
                       "attention_mask": torch.tensor([[0, 1, 1]])}):  # fmt: skip
            assert engine.submit(prompt, GREEDY).result(30).outputs[0].text == "CD"
        assert engine.submit(HI, GREEDY).result(30).prompt == "user: Hi\nassistant:"
        for wrong in ({"text": "A"}, b"A", padded()):
            with pytest.raises(InvalidRequestError):
                engine.submit(wrong, GREEDY)
        with pytest.raises(InvalidRequestError, match="of type dict; use SamplingParams"):
            engine.submit("A", {"max_tokens": 3})


@pytest.mark.parametrize("messages", [HI, [HI], (HI,), [[HI]], [[HI], [HI]]])
def test_chats_are_one_conversation_or_several(llm: LLM, messages: Any) -> None:
    outputs = llm.chat(messages, GREEDY)
    assert [output.prompt for output in outputs] == ["user: Hi\nassistant:"] * len(outputs)
    assert len(outputs) == (2 if messages == [[HI], [HI]] else 1)


@pytest.mark.parametrize(
    "messages",
    [None, "Hi", b"Hi", 5, ["Hi"], [[A]], [A], [[HI], "Hi"], [[HI], []], [[HI, "Hi"]], {"prompt": "Hi"}, padded(),
     [{"prompt": "Hi"}], [[{"prompt": "Hi"}]], iter([HI])],
)  # fmt: skip
def test_what_is_no_conversation_is_never_taken_for_one(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="give a list of chat messages"):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("params", [{"max_tokens": 2}, "greedy", [{"max_tokens": 2}], [None], iter([GREEDY]), 5])
def test_what_is_no_sampling_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        llm.generate(["A"], params)


def test_the_lists_are_the_callers_own() -> None:
    prompts, messages = ["A"], [HI]
    assert as_prompts(prompts) == ["A"] and as_prompts(prompts) is not prompts
    assert as_conversations(messages) == [[HI]]

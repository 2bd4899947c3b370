"""Where answers end: at what the model's configuration or its tokenizer calls the end, whoever serves them."""

from __future__ import annotations

from typing import Any

import pytest

from alphabet_model import AlphabetModel
from calls import Alphabet
from paged_core import LLM, AsyncEngine, Engine, EngineConfig, SamplingParams, TextCodec
from paged_serving import ChatCall, CompletionCall, TGICall
from toy_tokenizers import CharacterTokenizer

H = ord("H") - 32
CONFIG = EngineConfig(num_blocks=64, attention_backend="reference")


class TurnTokenizer(CharacterTokenizer):
    """It ends turns with "H", of which the model's configuration knows nothing: that ends texts with token 96."""

    def __init__(self, eos_token_id: Any = H) -> None:
        super().__init__()
        self.eos_token_id = eos_token_id
        self.all_special_ids = [H, 96]


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": 20, **fields})


TOKENIZER = TurnTokenizer()


def test_llm_and_async_engine_end_at_the_tokenizers_end_too() -> None:
    prompts = [[H - 3], [94]]
    llm = LLM(AlphabetModel(), tokenizer=TurnTokenizer(), config=CONFIG)
    ends = [output.outputs[0] for output in llm.generate(prompts, greedy())]
    with AsyncEngine(AlphabetModel(), tokenizer=TurnTokenizer(), config=CONFIG) as engine:
        ends += [engine.submit(prompt, greedy()).result(30).outputs[0] for prompt in prompts]
    told = [("FG", "stop", None), ("\x7f", "stop", None)]
    assert [(end.text, end.finish_reason, end.stop_reason) for end in ends] == told * 2


def test_what_goes_on_after_an_end_goes_on_after_this_one_too() -> None:
    llm = LLM(AlphabetModel(), tokenizer=TurnTokenizer(), config=CONFIG)
    (goes_on,) = llm.generate("E", greedy(ignore_eos=True, max_tokens=5))[0].outputs
    assert (goes_on.finish_reason, goes_on.token_ids[2]) == ("length", H)
    (late,) = llm.generate("E", greedy(min_tokens=4, max_tokens=5))[0].outputs
    assert H not in late.token_ids[:4], "min_tokens forbids it"
    beams = llm.generate("E", greedy(use_beam_search=True, n=2, max_tokens=5))[0].outputs
    assert (beams[0].text, beams[0].finish_reason) == ("FG", "stop")


def test_an_engine_by_itself_knows_the_configurations_end_only() -> None:
    llm = LLM(Engine(AlphabetModel(), CONFIG), tokenizer=TurnTokenizer())
    llm.engine.add_request("plain", [H - 2], greedy(max_tokens=5))
    outputs = []
    while llm.engine.has_work:
        outputs += llm.engine.step()
    assert [token for output in outputs for token in output.token_ids] == list(range(H - 1, H + 4))


@pytest.mark.parametrize(("known", "ids"), [(None, ()), (H, (H,)), ([H, 96], (H, 96)), (5000, (5000,))])
def test_an_end_that_the_model_does_not_have_ends_nothing(known: Any, ids: tuple[int, ...]) -> None:
    tokenizer = TurnTokenizer(known)
    assert TextCodec(tokenizer).eos_token_ids == ids
    (output,) = LLM(AlphabetModel(), tokenizer=tokenizer, config=CONFIG).generate([[H - 3]], greedy(max_tokens=5))
    assert output.outputs[0].finish_reason == ("stop" if H in ids else "length")
    beams = LLM(AlphabetModel(), tokenizer=tokenizer, config=CONFIG).generate(
        [[H - 3]], greedy(max_tokens=5, use_beam_search=True, n=2)
    )
    assert beams[0].error is None and beams[0].outputs[0].finish_reason == output.outputs[0].finish_reason


def test_every_protocol_tells_it_as_the_end_of_the_text(alphabet: Alphabet) -> None:
    body = {"prompt": "E", "max_tokens": 20, "temperature": 0}
    (choice,) = alphabet.answer(CompletionCall(body, alphabet.served, "1"))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("FG", "stop", None)
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20, "temperature": 0}
    (choice,) = alphabet.answer(ChatCall(chat, alphabet.served, "1"))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (";<=>?@ABCDEFG", "stop")
    asked = {"inputs": "E", "parameters": {"max_new_tokens": 20, "details": True}}
    details = alphabet.answer(TGICall(asked, alphabet.served, False))["details"]
    assert details["finish_reason"] == "eos_token"


def test_a_fulfilled_structure_may_end_with_it(alphabet: Alphabet) -> None:
    body = {"prompt": "E", "max_tokens": 20, "temperature": 0, "guided_regex": "FG+", "logit_bias": {"96": -100}}
    (choice,) = alphabet.answer(CompletionCall(body, alphabet.served, "1"))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("FG", "stop")

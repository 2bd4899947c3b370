"""LLM, as someone with a list of prompts sees it."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alphabet_model import AlphabetModel
from paged_core import (
    LLM,
    AsyncEngine,
    ConfigError,
    Engine,
    EngineConfig,
    InvalidRequestError,
    SamplingParams,
    hookimpl,
)
from paged_core.scheduling.request import RequestOutput
from toy_tokenizers import CharacterTokenizer, ChokingTokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=5)


@pytest.fixture
def model() -> AlphabetModel:
    return AlphabetModel()


@pytest.fixture
def llm(model: AlphabetModel) -> Iterator[LLM]:
    llm = LLM(model, tokenizer=CharacterTokenizer(), num_blocks=32, attention_backend="reference")
    yield llm
    llm.close()


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 20, **fields})


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    outputs = llm.generate(["A", [33], [{"role": "user", "content": "X"}], "0"], GREEDY)
    assert [output.prompt for output in outputs] == ["A", None, "user: X\nassistant:", "0"]
    assert [output.outputs[0].text for output in outputs] == ["BCDEF", "BCDEF", ";<=>?", "12345"]
    assert outputs[0].prompt_token_ids == [33]
    assert outputs[0].outputs[0].token_ids == [34, 35, 36, 37, 38]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    for prompt in ("A", [33], [{"role": "user", "content": "X"}]):
        assert len(llm.generate(prompt, GREEDY)) == 1
    assert llm.generate([], GREEDY) == []
    assert len(llm.chat([[{"role": "user", "content": "X"}]] * 2, GREEDY)) == 2
    assert len(llm.generate("A")[0].outputs[0].token_ids) == 16


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    outputs = llm.generate(["A", "A"], [params(max_tokens=1), params(max_tokens=3)])
    assert [output.outputs[0].text for output in outputs] == ["B", "BCD"]
    with pytest.raises(InvalidRequestError, match="2 prompts and 1"):
        llm.generate(["A", "A"], [GREEDY])


def test_n_outputs_share_a_prompt(llm: LLM) -> None:
    output = llm.generate("A", params(n=3, temperature=0.8, max_tokens=4))[0]
    assert [(row.index, row.text) for row in output.outputs] == [(0, "BCDE"), (1, "BCDE"), (2, "BCDE")]


@pytest.mark.parametrize("bad", ["", [], [1000], [1] * 300, "A" * 300, object()])
def test_a_bad_prompt_harms_no_other(llm: LLM, bad: Any) -> None:
    first, refused, last = llm.generate(["A", bad, "K"], params(n=2, max_tokens=3))
    assert (first.outputs[1].text, last.outputs[0].text) == ("BCD", "LMN")
    assert first.error is None
    assert refused.error
    assert [row.finish_reason for row in refused.outputs] == ["error", "error"]


def test_a_logits_processor_that_raises_ends_its_own_request_only(llm: LLM) -> None:
    def broken(input_ids: Any, scores: Any) -> Any:
        raise ZeroDivisionError("mine")

    good, bad = llm.generate(["A", "A"], [GREEDY, params(logits_processors=[broken])])
    assert good.outputs[0].text == "BCDEF"
    assert bad.outputs[0].finish_reason == "error"
    assert bad.error is not None and "mine" in bad.error


def test_a_tokenizer_that_chokes_on_a_token_ends_its_own_request_only(model: AlphabetModel) -> None:
    llm = LLM(model, tokenizer=ChokingTokenizer(), num_blocks=32, attention_backend="reference")
    bad, good = llm.generate([[38], [50]], GREEDY)
    assert bad.outputs[0].finish_reason == "error" and "token 40" in str(bad.error)
    assert good.outputs[0].finish_reason == "length"
    llm.generate([[50]], GREEDY)
    assert not llm.engine.has_work


def test_an_engine_that_fails_for_good_says_so_instead_of_hanging(model: AlphabetModel) -> None:
    class Dying(Engine):
        def step(self) -> list[RequestOutput]:
            raise MemoryError("no more")

    llm = LLM(Dying(model, EngineConfig(num_blocks=8, attention_backend="reference")), tokenizer=CharacterTokenizer())
    with pytest.raises(MemoryError, match="no more"):
        llm.generate("A", GREEDY)


def test_a_stop_string_ends_the_text_before_it_and_keeps_its_tokens(llm: LLM, model: AlphabetModel) -> None:
    row = llm.generate("A", params(stop=["EFG", "XYZ"]))[0].outputs[0]
    assert (row.text, row.finish_reason, row.stop_reason) == ("BCD", "stop", "EFG")
    assert row.token_ids == [34, 35, 36, 37, 38, 39]
    assert llm.generate("A", params(stop="EFG", include_stop_str_in_output=True))[0].outputs[0].text == "BCDEFG"
    assert not llm.engine.has_work


def test_a_stop_string_found_with_the_last_token_is_a_stop(llm: LLM) -> None:
    row = llm.generate("A", params(stop="EF", max_tokens=5))[0].outputs[0]
    assert (row.text, row.finish_reason) == ("BCD", "stop")
    half = llm.generate("A", params(stop="EFG", max_tokens=5))[0].outputs[0]
    assert (half.text, half.finish_reason, half.stop_reason) == ("BCDEF", "length", None)


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    row = llm.generate("A", params(stop=["C", "F"], min_tokens=3))[0].outputs[0]
    assert row.text == "BCDE"


def test_a_stop_token_is_no_text_unless_asked_for(llm: LLM) -> None:
    row = llm.generate("A", params(stop_token_ids=[36]))[0].outputs[0]
    assert (row.text, row.token_ids, row.finish_reason, row.stop_reason) == ("BC", [34, 35, 36], "stop", 36)
    shown = llm.generate("A", params(stop_token_ids=[36], include_stop_str_in_output=True))[0].outputs[0]
    assert shown.text == "BCD"


def test_eos_ends_the_text_without_a_trace(llm: LLM) -> None:
    row = llm.generate([[93]], params(skip_special_tokens=False))[0].outputs[0]
    assert (row.text, row.token_ids, row.finish_reason, row.stop_reason) == ("~\x7f", [94, 95, 96], "stop", None)
    ignored = llm.generate([[94]], params(ignore_eos=True, max_tokens=4))[0].outputs[0]
    assert (ignored.text, ignored.finish_reason) == ("\x7f !", "length")


def test_bad_words_are_avoided(llm: LLM) -> None:
    assert "CD" not in llm.generate("A", params(bad_words=["CD"]))[0].outputs[0].text


def test_logprobs_and_metrics_are_told(llm: LLM) -> None:
    output = llm.generate("AB", params(max_tokens=3, logprobs=1, prompt_logprobs=0))[0]
    row = output.outputs[0]
    assert row.logprobs is not None and row.cumulative_logprob is not None
    assert [next(iter(entry)) for entry in row.logprobs] == row.token_ids
    total = sum(entry[token].logprob for entry, token in zip(row.logprobs, row.token_ids, strict=True))
    assert math.isclose(row.cumulative_logprob, total)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 2
    metrics = output.metrics
    assert metrics is not None and metrics.first_token is not None and metrics.finish is not None
    assert metrics.arrival <= metrics.first_token <= metrics.finish
    assert llm.generate("AB", GREEDY)[0].outputs[0].logprobs is None


def test_cached_prompt_tokens_are_counted(llm: LLM) -> None:
    prompt = list(range(40))
    llm.generate([prompt], GREEDY)
    metrics = llm.generate([prompt], GREEDY)[0].metrics
    assert metrics is not None and metrics.num_cached_tokens == 32


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_cancels_the_call_and_leaves_the_llm_usable(llm: LLM, model: AlphabetModel) -> None:
    steps = []

    def interrupt(token_ids: list[int]) -> None:
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        steps.append(token_ids)  # reached: the step is not torn

    model.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["A", "B"], params(max_tokens=100))
    assert len(steps) == 3
    assert not llm.engine.has_work
    assert llm.generate("A", GREEDY)[0].outputs[0].text == "BCDEF"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_wait_for_the_step(llm: LLM, model: AlphabetModel) -> None:
    def impatient(token_ids: list[int]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second should have come through")

    model.before_forward = impatient
    with pytest.raises(KeyboardInterrupt):
        llm.generate("A", GREEDY)


def test_threads_may_share_an_llm(llm: LLM) -> None:
    texts: dict[int, list[str]] = {}

    def work(number: int) -> None:
        prompts = [chr(65 + number), chr(66 + number)]
        texts[number] = [output.outputs[0].text for output in llm.generate(prompts, params(max_tokens=2))]

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    alphabet = "ABCDEFGHIJKLMN"
    assert texts == {n: [alphabet[n + 1 : n + 3], alphabet[n + 2 : n + 4]] for n in range(6)}


def test_a_progress_bar_counts_prompts_and_tokens(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["A", "", "B"], GREEDY, use_tqdm=True)
    shown = capfd.readouterr().err
    assert "3/3" in shown and "out tok/s" in shown


def test_an_engine_may_be_given_and_config_only_once(model: AlphabetModel) -> None:
    engine = Engine(model, EngineConfig(num_blocks=8, attention_backend="reference"))
    assert LLM(engine).generate([[33]], GREEDY)[0].outputs[0].token_ids == [34, 35, 36, 37, 38]
    for options in ({"num_blocks": 8}, {"config": EngineConfig()}, {"dtype": "float32"}, {"plugins": [object()]}):
        with pytest.raises(TypeError, match=f"already, and {next(iter(options))} can't change it"):
            LLM(engine, **options)
    with pytest.raises(TypeError, match="not both"):
        LLM(model, config=EngineConfig(), num_blocks=8)


class Loader:
    """A plugin that notes how a model is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any, Any]] = []

    @hookimpl
    def load_model(self, source: Any, device: Any, dtype: Any) -> Any:
        self.asked.append((source, device, dtype))
        return AlphabetModel()

    @hookimpl
    def load_tokenizer(self, source: Any) -> Any:
        return CharacterTokenizer()


@pytest.mark.parametrize("kind", [LLM, AsyncEngine])
def test_dtype_device_and_plugins_go_to_the_engine(kind: Any) -> None:
    loader = Loader()
    fields: dict[str, Any] = {"plugins": [loader], "num_blocks": 8, "attention_backend": "reference"}
    for asked in ({"dtype": "bfloat16", "device": "cpu"}, {"dtype": torch.bfloat16, "device": torch.device("cpu")}):
        kind("some/model", **asked, **fields).close()
    config = EngineConfig(num_blocks=8, attention_backend="reference")
    kind("some/model", dtype="half", config=config, plugins=[loader]).close()
    kind("some/model", dtype="auto", **fields).close()
    asked_for = [("some/model", "cpu", "bfloat16")] * 2 + [("some/model", None, "float16"), ("some/model", None, None)]
    assert loader.asked == asked_for


@pytest.mark.parametrize("kind", [LLM, AsyncEngine])
def test_what_was_wished_what_became_of_it_and_the_tokenizer_can_be_read(kind: Any, model: AlphabetModel) -> None:
    tokenizer = CharacterTokenizer()
    frontend = kind(model, tokenizer=tokenizer, num_blocks=32, attention_backend="reference")
    assert frontend.tokenizer is tokenizer
    assert (frontend.config.num_blocks, frontend.config.block_size) == (32, None)
    assert (frontend.sizes.num_blocks, frontend.sizes.block_size) == (32, 8)
    frontend.close()


@pytest.mark.parametrize("kind", [LLM, AsyncEngine])
def test_an_option_that_nobody_knows_is_refused_by_its_name(kind: Any, model: AlphabetModel) -> None:
    with pytest.raises(TypeError, match="no option called 'max_modellen'; did you mean max_model_len"):
        kind(model, max_modellen=8)
    with pytest.raises(TypeError, match=r"'swap_space'; there are device, dtype, .*num_blocks"):
        kind(model, swap_space=2)


@pytest.mark.parametrize("kind", [LLM, AsyncEngine])
def test_a_model_that_is_there_is_neither_cast_nor_moved(kind: Any, model: AlphabetModel) -> None:
    fields: dict[str, Any] = {"num_blocks": 8, "attention_backend": "reference"}
    kind(model, dtype="float32", device="cpu", **fields).close()
    with pytest.raises(ConfigError, match="computes in float32 on cpu, and bfloat16 on cpu is asked for"):
        kind(model, dtype="bfloat16", **fields)
    with pytest.raises(ConfigError, match="float32 on cuda:1 is asked for"):
        kind(model, device="cuda:1", **fields)


def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused(model: AlphabetModel) -> None:
    llm = LLM(model, num_blocks=8, attention_backend="reference")
    ids, text, stop = llm.generate([[33], "A", [33]], [GREEDY, GREEDY, params(stop="X")])
    assert (ids.outputs[0].text, ids.outputs[0].token_ids) == ("", [34, 35, 36, 37, 38])
    assert text.error is not None and "tokenizer" in text.error
    assert stop.error is not None and "stop_token_ids" in stop.error

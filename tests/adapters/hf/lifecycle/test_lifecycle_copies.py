"""A patched model is copied, saved and dropped, and called in its callers' own ways."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    pipeline,
)

from paged_hf import PagedGenerate, paged_generate
from patched_calls import GREEDY, agrees, host_of, prompts, resize

# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


# ---- copied, saved, dropped --------------------------------------------------------------------------------------


def _saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved_and_loaded,
    "the stand-in itself": lambda model: pickle.loads(pickle.dumps(model.generate)).model,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_a_stand_in_of_its_own(model: Any, way: str) -> None:
    before = agrees(model)
    twin = COPIES[way](model)
    assert isinstance(twin.generate, PagedGenerate) and twin.generate.model is twin
    assert agrees(twin) == before
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert agrees(twin) != before
    assert agrees(model) == before


def test_a_model_can_be_copied_while_it_generates(model: Any) -> None:
    copies: list[Any] = []

    def copies_once(input_ids: Tensor, scores: Tensor) -> Tensor:
        if not copies:
            copies.extend(way(model) for way in COPIES.values())
        return scores

    model.generate(**prompts(), **GREEDY, logits_processor=LogitsProcessorList([copies_once]))
    assert model.generate.last_report().tier == "native"
    for twin in copies:
        agrees(twin)


def test_a_shallow_copy_answers_as_stock_does(model: Any) -> None:
    twin = copy.copy(model)
    expected = model.generate.stock(**prompts(), **GREEDY)
    assert torch.equal(twin.generate(**prompts(), **GREEDY), expected)


def test_save_pretrained_and_from_pretrained_know_nothing_of_it(model: Any, tmp_path: Any) -> None:
    before = agrees(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "generate" not in vars(loaded)
    loaded.generate = paged_generate(loaded, check=False)
    assert agrees(loaded) == before


@pytest.mark.parametrize("check", [False, True])
def test_a_dropped_model_is_freed_with_all_that_was_made_for_it(make: Any, check: bool) -> None:
    model = make()
    model.generate = paged_generate(model, check=check)
    agrees(model)
    engine = host_of(model).engine
    weight = model.lm_head.weight
    gone = [weakref.ref(thing) for thing in (model, engine, engine._runner.cache, weight)]
    del model, engine, weight
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_released_memory_is_given_back_and_taken_anew(model: Any) -> None:
    before = agrees(model)
    engine = host_of(model).engine
    assert engine.memory.num_blocks_backed > 0
    assert model.generate.release() is True
    assert engine.memory.num_blocks_backed == 0
    assert agrees(model) == before
    assert model.generate.release() is True


def test_what_was_wished_of_the_engine_and_what_became_of_it_can_be_read(make: Any) -> None:
    model = make()
    patched = model.generate = paged_generate(model, kv_cache_memory=1 << 20, check=False)
    assert patched.config.kv_cache_bytes == 1 << 20
    assert patched.sizes is None, "nothing was computed yet"
    agrees(model)
    sizes = patched.sizes
    assert sizes.max_num_seqs == patched.config.max_num_seqs
    assert sizes.num_slab_blocks == sizes.num_blocks, "the budget is less than a slab"


def test_memory_is_not_given_back_under_a_running_call(model: Any) -> None:
    answers: list[bool] = []

    def release(input_ids: Tensor, scores: Tensor) -> Tensor:
        answers.append(model.generate.release())
        return scores

    got = model.generate(**prompts(), **GREEDY, logits_processor=LogitsProcessorList([release]))
    assert set(answers) == {False}
    assert torch.equal(got, model.generate.stock(**prompts(), **GREEDY))


def test_memory_grows_by_slabs_up_to_the_budget(model: Any) -> None:
    model.generate.tiers.host.config = replace(model.generate.tiers.host.config, kv_cache_slab_bytes=8 * 2048)
    agrees(model)
    memory = host_of(model).engine.memory
    assert 0 < memory.num_blocks_backed <= 32 < memory.num_blocks
    model.generate(**prompts(rows=8), **GREEDY | {"max_new_tokens": 60})
    backed = host_of(model).engine.memory.num_blocks_backed
    assert memory.num_blocks_backed < backed < 200 < memory.num_blocks


# ---- callers' ways of calling ------------------------------------------------------------------------------------


def test_trainers_ways_of_calling_stay_native(model: Any) -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=10, pad_token_id=0, eos_token_id=[5, 17])
    ways: list[dict[str, Any]] = [
        {"generation_config": config, "disable_compile": True, "synced_gpus": False},
        {"generation_config": config, "disable_compile": True, "return_dict_in_generate": True, "output_logits": True},
        {"generation_config": config, "use_cache": True, "stop_strings": None, "tokenizer": None},
    ]
    for way in ways:
        got, expected = model.generate(**prompts(), **way), model.generate.stock(**prompts(), **way)
        assert model.generate.last_report().tier == "native", way
        tokens = [r if isinstance(r, Tensor) else r.sequences for r in (got, expected)]
        assert torch.equal(*tokens)
    got = model.generate(prompts()["input_ids"], config, attention_mask=prompts()["attention_mask"])
    assert torch.equal(got, tokens[1])
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(**prompts(), not_an_argument=1)
    agrees(model)


WRONG: dict[str, dict[str, Any]] = {
    "padding beyond the vocabulary": {"pad_token_id": 500, "input_ids": torch.tensor([[500, 6, 7], [8, 9, 4]]),
                                      "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
    "the same, in beams": {"pad_token_id": 500, "input_ids": torch.tensor([[500, 6, 7], [8, 9, 4]]),
                           "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]), "num_beams": 2},
    "negative padding": {"input_ids": torch.tensor([[-1, 6, 7], [8, 9, 4]]),
                         "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
    "tokens beyond the vocabulary": {"input_ids": torch.tensor([[500, 6, 7]])},
    "three dimensions": {"input_ids": torch.tensor([[[5, 6, 7], [8, 9, 4]]])},
    "three dimensions, masked": {"input_ids": torch.tensor([[[5, 6]]]), "attention_mask": torch.ones(1, 1, 2).long()},
    "one dimension": {"input_ids": torch.tensor([5, 6, 7])},
    "no rows": {"input_ids": torch.zeros(0, 3, dtype=torch.int64)},
    "floats": {"input_ids": torch.tensor([[5.0, 6.0]])},
    "a list": {"input_ids": [[5, 6, 7]]},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore:.*pad_token_id:UserWarning")
def test_what_stock_refuses_is_refused_in_stocks_own_words(model: Any, wrong: str) -> None:
    errors: list[BaseException] = []
    for generate in (model.generate.stock, model.generate):
        with pytest.raises(Exception) as raised:
            generate(**{**GREEDY, **WRONG[wrong]})
        errors.append(raised.value)
    assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))
    agrees(model)


def test_new_tokens_of_a_resized_vocabulary_run_natively(model: Any) -> None:
    agrees(model)
    resize(model)
    given = prompts()
    given["input_ids"][:, -2] = 120
    agrees(model, **given)
    model.resize_token_embeddings(96)
    agrees(model)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {chr(32 + i): i for i in range(95)} | {"<eos>": 95}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    tokenizer.padding_side = "left"
    return tokenizer


def test_the_pipeline_runs_on_it(model: Any, tokenizer: Any) -> None:
    stock_model = copy.deepcopy(model)
    del stock_model.generate
    ours = pipeline("text-generation", model=model, tokenizer=tokenizer)
    theirs = pipeline("text-generation", model=stock_model, tokenizer=tokenizer)
    plain = {"do_sample": False, "max_new_tokens": 6}
    texts = ["hello there", "a", "some longer text"]
    chat = [{"role": "user", "content": "hi"}]
    calls: list[tuple[Any, dict[str, Any]]] = [
        ("hello", {}),
        (texts, {}),
        (texts, {"batch_size": 3}),
        (chat, {}),
        ([chat, chat], {"batch_size": 2}),
        ("hello", {"num_beams": 2, "num_return_sequences": 2}),
        (texts, {"return_full_text": False, "batch_size": 2}),
        ("hello", {"return_tensors": True}),
    ]
    for inputs, options in calls:
        assert ours(inputs, **plain, **options) == theirs(inputs, **plain, **options), (inputs, options)
        assert model.generate.last_report().tier == "native", options
    for options in ({"num_return_sequences": 3}, {"top_k": 5}):
        answers = []
        for pipe in (ours, theirs):
            torch.manual_seed(5)
            answers.append(pipe("hello", do_sample=True, max_new_tokens=6, **options))
        assert answers[0] == answers[1]
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    answer = ours("hello", **plain, streamer=streamer, return_full_text=False)
    assert model.generate.last_report().loop == "free"
    assert "".join(streamer) == answer[0]["generated_text"]

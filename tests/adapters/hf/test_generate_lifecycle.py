"""A patched model may be copied, saved, trained, wrapped, changed and dropped: the next call answers as stock would."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    pipeline,
)

from paged_hf import PagedGenerate, paged_generate
from paged_hf.cache.paged_cache import PagedLayer
from paged_hf.generate import report
from paged_hf.upstream import CACHE

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
# what PEFT asks transformers for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
MODES: dict[str, dict[str, Any]] = {"free": {}, "lockstep": {"num_beams": 2}}


@pytest.fixture
def make(tiny: Any) -> Callable[..., Any]:
    def make(kind: str = "llama", **own: Any) -> Any:
        return tiny(kind, **{**SMALL, **own})

    return make


@pytest.fixture
def model(make: Any) -> Any:
    model = make()
    model.generate = paged_generate(model, check=False)
    return model


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert "paged-generate" not in {thread.name for thread in threading.enumerate()}


def prompts(seed: int = 0, rows: int = 3) -> dict[str, Tensor]:
    """Rows of 9, 8, 7, ... tokens, padded on the left."""
    ids = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def agrees(model: Any, tier: str = "native", **options: Any) -> list[list[int]]:
    """Free and lockstep calls give stock's tokens, by the tier named. Returns the free call's."""
    given = {**prompts(), **GREEDY, **options}
    answers = []
    for mode, own in MODES.items():
        got = model.generate(**given, **own)
        taken = model.generate.last_report()
        assert taken.tier == tier, (mode, taken)
        assert torch.equal(got, model.generate.stock(**given, **own)), mode
        answers.append(got.tolist())
    return answers[0]


def host_of(model: Any) -> Any:
    return model.generate.tiers.host


# ---- it looks like generate, and goes away -----------------------------------------------------------------------


def test_signature_and_docstring_are_those_of_stock(model: Any) -> None:
    assert inspect.signature(model.generate) == inspect.signature(model.generate.stock)
    assert model.generate.__doc__ == GenerationMixin.generate.__doc__
    assert model.generate.__name__ == "generate"
    assert next(iter(inspect.signature(model.generate).parameters)) == "inputs"


def test_it_has_what_a_bound_method_has(make: Any, model: Any) -> None:
    bound = model.generate.stock
    for name in ("__self__", "__func__", "__wrapped__", "__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(model.generate, name) is getattr(bound, name), name
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(make(), config)
    assert not hasattr(paged_generate(wrapped, check=False), "__wrapped__"), "PEFT's own generate has none"
    assert torch.equal(model.generate.__wrapped__(model, **prompts(), **GREEDY), bound(**prompts(), **GREEDY))


def test_stock_is_the_models_own_method(model: Any) -> None:
    assert model.generate.stock == type(model).generate.__get__(model)
    assert model.generate(**prompts(), **GREEDY).tolist() == model.generate.stock(**prompts(), **GREEDY).tolist()


def test_as_stock_holds_for_its_thread_and_its_block(model: Any) -> None:
    tiers: list[str] = []

    def call() -> None:
        model.generate(**prompts(), **GREEDY)
        tiers.append(model.generate.last_report().tier)

    with model.generate.as_stock():
        call()
        with model.generate.as_stock():
            pass
        call()
        other = threading.Thread(target=call)
        other.start()
        other.join()
    call()
    with pytest.raises(KeyError), model.generate.as_stock():
        raise KeyError
    call()
    assert tiers == ["stock", "stock", "native", "native", "native"]


def test_as_a_context_manager_it_gives_back_what_the_model_had(make: Any) -> None:
    model = make()
    with paged_generate(model, check=False) as patched:
        assert model.generate is patched
        agrees(model)
    assert "generate" not in vars(model)
    own = model.generate = lambda *args, **kwargs: "the user's own"
    with pytest.raises(ZeroDivisionError), paged_generate(model, check=False):
        agrees(model)
        raise ZeroDivisionError
    assert model.generate is own
    assert patched.tiers.host.engine is None or patched.tiers.host.engine.memory.num_blocks_backed == 0


def test_patching_twice_is_harmless(model: Any) -> None:
    first = model.generate
    model.generate = paged_generate(model, check=False)
    assert model.generate is first
    agrees(model)
    model.generate = paged_generate(model, kv_cache_memory=1 << 20, check=False)
    assert model.generate is not first
    agrees(model)
    assert model.generate.stock == first.stock


def test_two_threads_may_patch_one_model(make: Any) -> None:
    model = make()
    made: list[Any] = []

    def patch() -> None:
        model.generate = paged_generate(model)
        made.append(model.generate(**prompts(), **GREEDY).tolist())

    threads = [threading.Thread(target=patch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [agrees(model)] * 4


def test_many_models_are_patched_at_once(make: Any) -> None:
    models = [make(kind, seed=seed) for seed, kind in enumerate(("llama", "llama", "gpt2", "qwen2"))]
    for model in models:
        model.generate = paged_generate(model, check=False)
    answers: dict[int, Any] = {}

    def call(number: int) -> None:
        answers[number] = models[number].generate(**prompts(), **GREEDY).tolist()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(len(models))] == [agrees(model) for model in models]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), "a path", None])
def test_what_has_no_generate_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="no generate"):
        paged_generate(wrong)


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
    _resize(model)
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


# ---- weights and modules that change between calls ---------------------------------------------------------------


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**prompts(3), labels=prompts(3)["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _load(model: Any) -> None:
    model.load_state_dict({name: weight.roll(1, 0) for name, weight in model.state_dict().items()})


def _edit_data(model: Any) -> None:
    for weight in model.parameters():
        weight.data.mul_(torch.linspace(0.5, 2, weight.shape[-1]))


def _replace_data(model: Any) -> None:
    for weight in model.parameters():
        weight.data = weight.data.roll(1, 0)


def _replace_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(3, 0))


def _tie(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.model.embed_tokens.weight = model.lm_head.weight


def _resize(model: Any) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(128)
    with torch.no_grad():
        model.lm_head.weight[96:].normal_(0, 1)


def _new_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: -forward(hidden)


def _new_module(model: Any) -> None:
    torch.manual_seed(2)
    model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(48, 32), nn.Tanh())


def _config(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 1.7


def _fewer_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": _step,
    "load_state_dict": _load,
    "edits through data": _edit_data,
    "data replaced": _replace_data,
    "a parameter replaced": _replace_parameter,
    "tied": _tie,
    "embeddings resized": _resize,
    "a forward replaced": _new_forward,
    "a module replaced": _new_module,
    "an attribute set": _config,
    "a layer removed": _fewer_layers,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_honours(model: Any, change: str) -> None:
    before = agrees(model)
    CHANGES[change](model)
    tier = "cache" if change == "a forward replaced" else "native"
    assert agrees(model, tier) != before, "the change changes nothing: it proves nothing"


def test_a_model_goes_to_another_dtype_and_back(model: Any) -> None:
    before = agrees(model)
    for there in (model.bfloat16, model.half, model.double):
        there()
        got = model.generate(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert model.generate.last_report().tier == "native"
        expected = model.generate.stock(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert got.logits[0].dtype == expected.logits[0].dtype
        torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=0.05, atol=0.1)
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    model.float().load_state_dict(weights)
    assert len(agrees(model)) == len(before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_mode_without_dropout_is_native_and_with_dropout_is_stocks(make: Any, kind: str) -> None:
    for dropout, tier in ((0.0, "native"), (0.5, "stock")):
        names = ("attention_dropout",) if kind == "llama" else ("attn_pdrop", "resid_pdrop", "embd_pdrop")
        model = make(kind, **dict.fromkeys(names, dropout))
        model.generate = paged_generate(model, check=False)
        agrees(model)
        model.train()
        for options in MODES.values():
            answers = []
            for generate in (model.generate, model.generate.stock):
                torch.manual_seed(0)
                answers.append(generate(**prompts(), **GREEDY, **options))
            assert torch.equal(*answers)
        assert model.training
        model.generate(**prompts(), **GREEDY)
        assert model.generate.last_report().tier == tier
        model.eval()
        agrees(model)
        next(model.children()).train()  # one part of it only
        model.generate(**prompts(), **GREEDY)
        assert model.generate.last_report().tier == tier


def _checkpointing(model: Any, what: str) -> None:
    name = next(f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient")
                if hasattr(model, f"{kind}_checkpointing_{what}"))  # fmt: skip
    getattr(model, name)()


def test_gradient_checkpointing_and_frozen_weights_change_nothing(model: Any) -> None:
    before = agrees(model)
    _checkpointing(model, "enable")
    assert agrees(model) == before
    model.train()
    options = {**prompts(), **GREEDY}
    got = model.generate(**options)
    assert "checkpointing" in model.generate.last_report().reason
    assert torch.equal(got, model.generate.stock(**options))
    model.eval()
    _checkpointing(model, "disable")
    model.requires_grad_(False)
    assert agrees(model) == before
    model.requires_grad_(True)
    assert agrees(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_and_gradients_are_left_alone(model: Any, mode: Any) -> None:
    model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    def fails(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("mine")

    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        agrees(model)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
        with pytest.raises(KeyError):
            model.generate(**prompts(), **GREEDY, logits_processor=LogitsProcessorList([fails]))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, before[name]) and weight.requires_grad and not weight.is_inference()
    model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    assert torch.allclose(model.lm_head.weight.grad, 2 * before["lm_head.weight"])
    agrees(model)


def test_forward_hooks_see_stocks_shapes_as_long_as_they_are_there(model: Any) -> None:
    before = agrees(model)
    layer = model.model.layers[1]
    shapes: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        shapes.append((args[0].shape, module is layer))

    handle = layer.register_forward_hook(note)
    for options in MODES.values():
        model.generate.stock(**prompts(), **GREEDY, **options)
        expected, shapes[:] = list(shapes), []
        model.generate(**prompts(), **GREEDY, **options)
        assert shapes == expected
        shapes.clear()
    handle.remove()
    assert agrees(model) == before
    change = layer.mlp.register_forward_hook(lambda module, args, output: -output)
    assert agrees(model, "cache") != before
    change.remove()
    steer = layer.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    assert agrees(model, "cache") != before
    steer.remove()
    assert agrees(model) == before


def test_hidden_states_asked_for_once_keep_no_later_call_from_the_engine(model: Any) -> None:
    before = agrees(model)
    model(**prompts(), output_hidden_states=True, output_attentions=True)
    assert agrees(model) == before


def test_another_attention_implementation_is_honoured(model: Any) -> None:
    before = agrees(model)
    model.set_attn_implementation("eager")
    assert agrees(model) == before
    model.set_attn_implementation("sdpa")
    assert agrees(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_under_autocast_stocks_loop_computes(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got = model.generate(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        expected = model.generate.stock(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert model.generate.last_report().tier == "cache"
        assert "autocast" in model.generate.last_report().reason
        torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=0.05, atol=0.05)
    with torch.autocast("cpu", enabled=False):
        agrees(model)


def test_torchs_defaults_are_honoured_and_left_alone(model: Any) -> None:
    before = agrees(model)
    torch.set_default_dtype(torch.float64)
    try:
        model.generate.tiers.host.drop()
        assert agrees(model) == before
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        assert agrees(model) == before
    given = {**prompts(), **GREEDY}
    with torch.device("meta"):
        got = model.generate(**given)
        expected = model.generate.stock(**given)
    assert torch.equal(got, expected)


def test_a_compiled_model_is_patched_as_the_model_inside(make: Any) -> None:
    model = make()
    compiled = torch.compile(model, backend="eager")
    compiled.generate = paged_generate(compiled, check=False)
    got = compiled.generate(**prompts(), **GREEDY)
    assert compiled.generate.last_report().tier == "native"
    assert torch.equal(got, type(model).generate(model, **prompts(), **GREEDY))


def _forward_as_one_graph(model: Any) -> None:
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")


def _layers_as_graphs(model: Any) -> None:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager")


def _child_in_a_wrapper(model: Any) -> None:
    model.model = torch.compile(model.model, fullgraph=True, backend="eager")


def _compile_method(model: Any) -> None:
    model.compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize("first", ["patched", "compiled"])
@pytest.mark.parametrize("compiled", [_forward_as_one_graph, _layers_as_graphs, _child_in_a_wrapper, _compile_method])
def test_compiled_forwards_are_run_by_the_engine_as_they_were(make: Any, compiled: Any, first: str) -> None:
    model, plain = make(), make()
    if first == "compiled":
        compiled(model)
    model.generate = paged_generate(model, check=False)
    if first == "patched":
        agrees(model)
        compiled(model)
    for own in MODES.values():
        assert torch.equal(model.generate(**prompts(), **GREEDY, **own), plain.generate(**prompts(), **GREEDY, **own))
        assert model.generate.last_report().tier == "native"


def test_calls_of_a_compiled_model_that_the_engine_does_not_know_are_stocks(make: Any) -> None:
    model, plain = make(), make()
    model.generate = paged_generate(model, check=False)
    _forward_as_one_graph(model)
    given = {**prompts(rows=1), **GREEDY, "prefill_chunk_size": 4}
    assert torch.equal(model.generate(**given), plain.generate(**given))
    taken = model.generate.last_report()
    assert taken.tier == "stock" and "compiled" in taken.reason


# ---- offloaded weights ------------------------------------------------------------------------------------------


def _all_on_the_cpu(model: Any, folder: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _all_on_disk(model: Any, folder: Any) -> Any:
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def _embeddings_on_disk(model: Any, folder: Any) -> Any:
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.embed_tokens"] = "disk"
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the:UserWarning")  # stock.s own, in 5.18
@pytest.mark.parametrize("offload", [_all_on_the_cpu, _all_on_disk, _embeddings_on_disk])
@pytest.mark.parametrize("check", [False, True])
def test_models_whose_weights_are_offloaded_answer_as_before(
    make: Any, tmp_path: Any, offload: Any, check: bool
) -> None:
    model, plain = make(), make()
    offload(model, tmp_path)
    assert model.device.type == "meta"
    model.generate = paged_generate(model, check=check)
    for own in MODES.values():
        assert torch.equal(model.generate(**prompts(), **GREEDY, **own), plain.generate(**prompts(), **GREEDY, **own))
        assert model.generate.last_report().tier == "cache"


# ---- PEFT --------------------------------------------------------------------------------------------------------


def _lora(model: Any, **adapters: int) -> Any:
    """LoRA adapters that change the answers, each from its own seed."""
    wrapped = None
    for name, seed in adapters.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, weight in wrapped.named_parameters():
                if f"lora_B.{name}" in key:
                    weight.normal_(0, 1)
    assert wrapped is not None
    return wrapped.eval()


def _patch_outside(wrapped: Any) -> None:
    wrapped.generate = paged_generate(wrapped, check=False)


def _patch_inside(wrapped: Any) -> None:
    base = wrapped.get_base_model()
    base.generate = paged_generate(base, check=False)


def _answers(wrapped: Any, tier: str = "native", **options: Any) -> list[list[int]]:
    """Tokens of a patched PEFT model, which are those of a copy that nobody has patched."""
    given = {**prompts(), **GREEDY, **options}
    plain = copy.deepcopy(wrapped)
    for model in (plain, plain.get_base_model()):
        vars(model).pop("generate", None)
    for own in MODES.values():
        got = wrapped.generate(**given, **own)
        taken = paged_generate.last_report()  # type: ignore[attr-defined]
        assert taken.tier == tier, taken
        assert torch.equal(got, plain.generate(**given, **own))
    return got.tolist()


@pytest.mark.parametrize("patch", [_patch_outside, _patch_inside])
def test_lora_adapters_are_honoured_however_they_are_turned(make: Any, patch: Any) -> None:
    wrapped = _lora(make(), first=1, second=2)
    patch(wrapped)
    seen = [_answers(wrapped)]
    with wrapped.disable_adapter():
        seen.append(_answers(wrapped))
    assert _answers(wrapped) == seen[0]
    wrapped.set_adapter("second")
    seen.append(_answers(wrapped))
    wrapped.set_adapter("first")
    assert _answers(wrapped) == seen[0]
    wrapped.merge_adapter()
    assert _answers(wrapped) == seen[0]
    wrapped.unmerge_adapter()
    assert _answers(wrapped) == seen[0]
    with torch.no_grad():
        wrapped.get_base_model().model.layers[0].self_attn.q_proj.lora_B["first"].weight.mul_(-3)
    seen.append(_answers(wrapped))
    wrapped.delete_adapter("second")
    assert _answers(wrapped) == seen[-1]
    assert len({str(answer) for answer in seen}) == 4, "an adapter changes nothing: it proves nothing"


def test_lora_weights_in_training_are_honoured(make: Any) -> None:
    wrapped = _lora(make(), first=1)
    _patch_outside(wrapped)
    wrapped.enable_input_require_grads()
    optimizer = torch.optim.SGD([w for w in wrapped.parameters() if w.requires_grad], lr=2.0)
    seen = []
    for _ in range(3):
        wrapped.train()
        wrapped(**prompts(3), labels=prompts(3)["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.eval()
        seen.append(str(_answers(wrapped)))
    assert len(set(seen)) == 3


def test_an_adapter_for_each_row_is_stocks(make: Any) -> None:
    wrapped = _lora(make(), first=1, second=2)
    before = copy.deepcopy(wrapped)
    _patch_outside(wrapped)
    given = {**prompts(), **GREEDY, "adapter_names": ["first", "__base__", "second"]}
    assert torch.equal(wrapped.generate(**given), before.generate(**given))
    assert wrapped.generate.last_report().tier == "stock"
    _answers(wrapped)


def test_a_merged_and_unloaded_model_is_patched_like_any_other(make: Any) -> None:
    wrapped = _lora(make(), first=1)
    _patch_outside(wrapped)
    with_adapter = _answers(wrapped)
    merged = wrapped.merge_and_unload()
    merged.generate = paged_generate(merged, check=False)
    agrees(merged)
    assert merged.generate(**prompts(), **GREEDY, num_beams=2).tolist() == with_adapter


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning")  # PEFT 0.21 on 5.24
def test_virtual_tokens_are_stocks(make: Any, kind: Any) -> None:
    wrapped = peft.get_peft_model(make(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    given = {**prompts(), **GREEDY}
    expected = copy.deepcopy(wrapped).generate(**given)
    wrapped.generate = paged_generate(wrapped)
    assert torch.equal(wrapped.generate(**given), expected)
    assert wrapped.generate.last_report().tier == "stock"
    with wrapped.disable_adapter():
        plain = wrapped.get_base_model()
        assert torch.equal(wrapped.generate(**given), type(plain).generate(plain, **given))


# ---- what is said, and what is checked first ---------------------------------------------------------------------


def test_each_reason_for_stock_is_told_once(model: Any, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "_warned", set())
    with caplog.at_level(logging.WARNING, "paged_hf"):
        for _ in range(3):
            model.generate(**prompts(), **GREEDY)
            model.generate(**prompts(), **GREEDY, output_hidden_states=True, return_dict_in_generate=True)
    assert [r.name for r in caplog.records].count("paged_hf") == 1
    assert "output_hidden_states" in caplog.text


class Stateful(nn.Module):
    """Attention that remembers how often it ran: another answer for whoever goes on over a cache of stock's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.num_calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        cache = kwargs.get(CACHE)
        goes_on = cache is not None and cache.get_seq_length() > 0
        output, weights = self.inner(*args, **kwargs)
        return output * (-1 if goes_on else 1), weights


def test_a_tier_that_differs_is_dropped_with_a_warning_and_stock_answers(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    model.model.layers[0].self_attn = Stateful(model.model.layers[0].self_attn)
    unchecked = paged_generate(model, check=False)
    expected = unchecked.stock(**prompts(), **GREEDY)
    assert not torch.equal(unchecked(**prompts(), **GREEDY), expected), "nothing to find"
    assert unchecked.last_report().tier == "native"
    with caplog.at_level(logging.WARNING, "paged_hf"):
        model.generate = paged_generate(model, check=True)
    assert "native" in caplog.text and "differ" in caplog.text
    assert torch.equal(model.generate(**prompts(), **GREEDY), expected)
    taken = model.generate.last_report()
    assert taken.tier == "cache" and "self-check" in taken.reason


@pytest.mark.parametrize("what", ["_read", "get_seq_length"])
def test_a_cache_in_blocks_that_answers_otherwise_is_not_used(
    make: Any, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(PagedLayer, what)
    monkeypatch.setattr(PagedLayer, what, lambda self, *args: right(self, *args) * 2)
    model = make()
    with caplog.at_level(logging.WARNING, "paged_hf"):
        model.generate = paged_generate(model)
    assert model.generate.tiers.dropped.keys() == {"cache"}
    assert "cache tier" in caplog.text
    model.register_forward_hook(lambda *args: None)
    agrees(model, "stock")


def test_the_self_check_leaves_no_trace_on_a_model_that_stock_would_compile(make: Any) -> None:
    model = make()
    settings = model.generation_config
    settings.cache_implementation = "static"
    settings.compile_config = CompileConfig(backend="eager")
    settings.compile_config._compile_all_devices = True  # stock compiles on accelerators only, unless told so
    before = [(module, dict(vars(module))) for module in model.modules()]
    config, chosen = copy.deepcopy(model.config), copy.deepcopy(settings)
    patched = paged_generate(model)
    assert patched.tiers.dropped == {}
    for module, attributes in before:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert model.config.to_dict() == config.to_dict()
    assert model.generation_config is settings and settings.to_dict() == chosen.to_dict()


def test_the_self_check_gives_back_the_random_numbers_that_a_model_draws(make: Any) -> None:
    model = make()
    layer = model.model.layers[0].mlp
    forward, drawn = layer.forward, []

    def draws(x: Any) -> Any:
        drawn.append(torch.rand(1))
        return forward(x)

    layer.forward = draws
    torch.manual_seed(11)
    state = torch.get_rng_state()
    paged_generate(model)
    assert drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_the_self_check_draws_no_random_numbers_and_leaves_nothing_behind(make: Any) -> None:
    model = make()
    model.generation_config.do_sample = True
    torch.manual_seed(11)
    state = torch.get_rng_state()
    config, mode = copy.deepcopy(model.generation_config), torch.is_grad_enabled()
    threads = threading.enumerate()
    patched = paged_generate(model)
    assert threading.enumerate() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == config.to_dict()
    assert torch.is_grad_enabled() == mode
    assert "generate" not in vars(model)
    assert patched.tiers.dropped == {}
    model.generation_config.do_sample = False
    model.generate = patched
    agrees(model)

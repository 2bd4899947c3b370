"""``paged_generate`` against stock in the same process: one tiny llama, every parameter of ``generate``.

Each call is made both ways. What it gives, raises, warns of, shows to the caller's objects and leaves of the random
numbers must be the same, and the report must name the tier that the call is meant to take.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AsyncTextIteratorStreamer,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)

from case_ids import told
from generate_parity import (
    EndsAtTurns,
    Options,
    Recorder,
    RecordingStreamer,
    answer,
    assert_alike,
    assert_same,
    some_rows,
)
from paged_hf import paged_generate
from paged_hf.upstream import CACHE, cache_in_result
from rounded_parity import HALVES

ENDS = list(range(5, 96, 9))  # a token in nine ends a row
FULL: Options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SHORT: Options = {"max_new_tokens": 7, "pad_token_id": 0}
WATERMARK = {"greenlist_ratio": 0.3, "bias": 3.0, "seeding_scheme": "selfhash"}


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    made.generate = paged_generate(made, check=False)
    return made


@pytest.fixture(scope="module")
def patched(model: Any) -> Any:
    return model.generate


@pytest.fixture
def own(model: Any) -> Iterator[Any]:
    """The model, whose generation_config the test may change."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    yield model
    model.generation_config = before


@pytest.fixture(scope="module")
def rows() -> Options:
    """Four prompts of 3 to 26 tokens."""
    ids, mask = some_rows((3, 26, 13, 7))
    return {"inputs": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", *(chr(ord("!") + i) for i in range(92)), " "]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", range(1, 9))
def test_greedy_rows_of_mixed_lengths_run_free_and_end_when_they_end(patched: Any, batch_size: int) -> None:
    ids, mask = some_rows((5, 17, 1, 30, 9, 2, 22, 13)[:batch_size], seed=batch_size)
    for ends in (None, ENDS, [ENDS[0]]):
        assert_same(
            patched,
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            eos_token_id=ends,
            pad_token_id=0,
            tier="native",
            loop="free",
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 1},
        {"max_length": 29},
        {"max_length": 27},
        {"max_length": 30, "max_new_tokens": 2},
        {"eos_token_id": ENDS},
        {"eos_token_id": 41},
        {"eos_token_id": ENDS, "pad_token_id": None},
        {"max_new_tokens": 9, "eos_token_id": ENDS, "pad_token_id": 77},
        {"eos_token_id": torch.tensor(ENDS)},
        {"cache_implementation": "dynamic"},
        {"disable_compile": True},
        {"synced_gpus": False},
        {"num_beams": 1, "early_stopping": False},
        {"output_scores": True},
        {"temperature": 0.5},
        {"use_cache": True},
        {"trust_remote_code": False},
        {"logits_to_keep": 1},
        {"max_time": None, "stop_strings": None, "prefix_allowed_tokens_fn": None},
    ],
    ids=str,
)
def test_plain_greedy_calls_run_free(patched: Any, rows: Options, options: Options) -> None:
    assert_same(patched, **{"pad_token_id": 0} | rows | options, tier="native", loop="free")


@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_sampling_draws_what_stock_draws(patched: Any, rows: Options, seed: int, num_samples: int, ends: Any) -> None:
    options = {"do_sample": True, "num_return_sequences": num_samples, "eos_token_id": ends, "max_new_tokens": 12}
    assert_same(patched, **rows, **options, pad_token_id=0, seed=seed, tier="native", loop="_sample")


@pytest.mark.parametrize("batch_size", range(1, 9))
def test_sampled_batches_of_any_size(patched: Any, batch_size: int) -> None:
    ids, mask = some_rows((5, 17, 1, 30, 9, 2, 22, 13)[:batch_size], seed=batch_size)
    options = {"do_sample": True, "eos_token_id": ENDS, "attention_mask": mask, **SHORT}
    assert_same(patched, ids, **options, **FULL, seed=batch_size, tier="native", loop="_sample")


# ---- processors and warpers ------------------------------------------------------------------------------------------

GREEDY_PROCESSORS: dict[str, Options] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [11, 12], *([i] for i in range(40, 60))]},
    "sequence_bias": {"sequence_bias": [[[10], 6.0], [[10, 20], 9.0], [[30], -4.0]]},
    "sequence_bias, a dict": {"sequence_bias": {(10,): 6.0, (10, 20): 9.0}},
    "forced_bos": {"forced_bos_token_id": 9},
    "forced_eos": {"forced_eos_token_id": 9},
    "forced_eos, a list": {"forced_eos_token_id": [9, 10]},
    "suppress_tokens": {"suppress_tokens": list(range(20, 70))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(50))},
    "min_length": {"min_length": 31, "eos_token_id": ENDS},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": ENDS},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": ENDS},
    "guidance_scale": {"guidance_scale": 1.7},
    "watermarking": {"watermarking_config": WatermarkingConfig(**WATERMARK)},
    "watermarking, SynthID": {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7, 11], ngram_len=3),
        "do_sample": True,
    },
    "watermarking, lefthash": {
        "watermarking_config": WatermarkingConfig(**{**WATERMARK, "seeding_scheme": "lefthash"})
    },
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [row + 3, int(ids[-1]) % 90 + 1, 50]},
    "everything": {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7]],
        "suppress_tokens": [8],
        "min_new_tokens": 3,
        "eos_token_id": ENDS,
        "renormalize_logits": True,
    },
}
WARPERS: dict[str, Options] = {
    "temperature": {"temperature": 0.4},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "top_h": {"top_h": 0.4},
    "all": {"temperature": 1.7, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
}


@pytest.mark.parametrize("name", GREEDY_PROCESSORS)
def test_stocks_processors(patched: Any, rows: Options, name: str) -> None:
    options = {"do_sample": False, **SHORT, **rows, **GREEDY_PROCESSORS[name]}
    assert_same(patched, **options, tier="native", loop="_sample")
    assert_same(patched, **options, **FULL, tier="native", loop="_sample")


@pytest.mark.parametrize("name", GREEDY_PROCESSORS)
def test_stocks_processors_while_sampling(patched: Any, rows: Options, name: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 2, **SHORT, **rows, **GREEDY_PROCESSORS[name]}
    if "guidance_scale" in name:
        options["num_return_sequences"] = 1  # stock's can't expand its negative prompt
    assert_same(patched, **options, tier="native", loop="_sample", seed=3)


@pytest.mark.parametrize("name", WARPERS)
def test_stocks_warpers(patched: Any, rows: Options, name: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 2, **SHORT, **rows, **WARPERS[name]}
    assert_same(patched, **options, eos_token_id=ENDS, tier="native", loop="_sample")
    assert_same(patched, **options, **FULL, renormalize_logits=True, tier="native", loop="_sample", seed=5)


@pytest.mark.parametrize("do_sample", [False, True])
def test_guidance_with_a_negative_prompt(patched: Any, rows: Options, do_sample: bool) -> None:
    ids, mask = some_rows((9, 4, 7, 9), seed=3)
    options = {"guidance_scale": 2.0, "do_sample": do_sample, **SHORT, **rows}
    assert_same(patched, **options, negative_prompt_ids=ids, tier="native", loop="_sample")
    assert_same(
        patched,
        **options,
        **FULL,
        negative_prompt_ids=ids,
        negative_prompt_attention_mask=mask,
        tier="native",
        loop="_sample",
    )


# ---- weights of 16 bits ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=HALVES)
def half(request: Any, tiny: Any) -> Any:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32).to(HALVES[request.param])
    return paged_generate(made, check=False)


@pytest.mark.parametrize("name", ["repetition_penalty", "guidance_scale", "everything"])
def test_processors_where_near_ties_decide(half: Any, rows: Options, name: str) -> None:
    options = {**SHORT, **rows, **GREEDY_PROCESSORS[name]}
    assert assert_same(half, **options, **FULL, tier="native", loop="_sample").num_compared >= 8


def test_objects_of_the_callers_where_near_ties_decide(half: Any, rows: Options) -> None:
    def fresh() -> Options:
        return {"logits_processor": [Recorder()], "stopping_criteria": [EndsAtTurns()]}

    assert assert_same(half, **SHORT, **rows, fresh=fresh, tier="native", loop="_sample").num_compared >= 8
    single = {"inputs": rows["inputs"][1:2], "attention_mask": rows["attention_mask"][1:2]}
    assert_same(half, **SHORT, **single, fresh=lambda: {"streamer": RecordingStreamer()}, tier="native")


def test_temperature_and_samples_where_near_ties_decide(half: Any, rows: Options) -> None:
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "temperature": 0.7, **SHORT, **rows}
    for seed in range(2):
        assert assert_same(half, **options, seed=seed, tier="native", loop="_sample").num_compared >= 30


# ---- beams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-0.7, 1.0, 2.0])
@pytest.mark.parametrize("ends", [None, 41, ENDS], ids=["no eos", "eos", "many"])
def test_beam_search(patched: Any, rows: Options, early_stopping: Any, length_penalty: float, ends: Any) -> None:
    options = {"num_beams": 3, "early_stopping": early_stopping, "length_penalty": length_penalty}
    options |= {"eos_token_id": ends, **SHORT, **rows}
    assert_same(patched, **options, tier="native", loop="_beam_search")
    assert_same(patched, **options, **FULL, num_return_sequences=2, tier="native", loop="_beam_search")


@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_beams_of_any_batch_and_width(patched: Any, batch_size: int, num_beams: int) -> None:
    ids, mask = some_rows((5, 17, 1, 30, 9, 2, 22, 13)[:batch_size], seed=batch_size)
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "eos_token_id": ENDS, "attention_mask": mask}
    assert_same(patched, ids, **options, **SHORT, **FULL, tier="native", loop="_beam_search")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
def test_beam_sampling(patched: Any, rows: Options, seed: int, ends: Any) -> None:
    options = {"num_beams": 3, "do_sample": True, "top_k": 20, "temperature": 1.3, "eos_token_id": ends}
    options |= SHORT | rows
    assert_same(patched, **options, seed=seed, tier="native", loop="_beam_search")
    assert_same(patched, **options, **FULL, num_return_sequences=3, seed=seed, tier="native", loop="_beam_search")


@pytest.mark.parametrize("name", [name for name in GREEDY_PROCESSORS if name != "guidance_scale"])
def test_beams_with_stocks_processors(patched: Any, rows: Options, name: str) -> None:
    options = {"num_beams": 3, **SHORT, **rows, **GREEDY_PROCESSORS[name]}
    assert_same(patched, **options, **FULL, tier="native", loop="_beam_search")


def test_blocks_that_beams_share_are_reported(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, num_beams=4, max_new_tokens=20, pad_token_id=0, tier="native", loop="_beam_search")
    report = patched.last_report()
    assert report.num_blocks_shared > report.num_blocks / 4 > 0


# ---- objects of the caller's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize(
    "mode",
    [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_processors_and_criteria_with_a_memory_see_what_stock_shows_them(
    patched: Any, rows: Options, mode: Options, ends: Any
) -> None:
    def fresh() -> Options:
        return {"logits_processor": [Recorder()], "stopping_criteria": [EndsAtTurns()]}

    loop = "_beam_search" if "num_beams" in mode else "_sample"
    options = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": ends, **rows, **mode}
    got = assert_same(patched, **options, fresh=fresh, tier="native", loop=loop)
    assert got.seen
    assert_same(patched, **options, **FULL, fresh=fresh, tier="native", loop=loop)


def test_a_processor_alone_and_a_criterion_alone(patched: Any, rows: Options) -> None:
    options = {"eos_token_id": ENDS, "max_new_tokens": 10, "pad_token_id": 0, **rows}
    assert_same(patched, **options, fresh=lambda: {"logits_processor": [Recorder()]}, tier="native", loop="_sample")
    assert_same(patched, **options, fresh=lambda: {"stopping_criteria": [EndsAtTurns()]}, tier="native", loop="_sample")


def test_a_criterion_that_says_one_word_for_all_rows(patched: Any, rows: Options) -> None:
    def third_step(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 29)

    assert_same(patched, **rows, **SHORT, stopping_criteria=[third_step], tier="native", loop="_sample")


def test_a_processor_of_a_type_that_stock_has_takes_its_place(patched: Any, rows: Options) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    own = [RepetitionPenaltyLogitsProcessor(3.0)]
    options = {"repetition_penalty": 1.1, **rows, **SHORT}
    assert_same(patched, **options, logits_processor=own, tier="native", loop="_sample")


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("length", [27, 31, 40])
def test_lengths_and_ends_that_criteria_of_the_callers_bring(
    patched: Any, rows: Options, length: int, mode: Options
) -> None:
    options: Options = {**rows, **mode, "pad_token_id": 0}
    assert_same(patched, **options, stopping_criteria=[MaxLengthCriteria(length)], tier="native")
    assert_same(patched, **options, stopping_criteria=[EosTokenCriteria(ENDS)], max_length=length, tier="native")
    if length == 40:  # beyond max_length, where stock's beams end in an IndexError
        mode = {"tier": None} if "num_beams" in mode else {"tier": "native"}
    else:
        mode = {"tier": "native"}
    assert_same(patched, **options, stopping_criteria=[MaxLengthCriteria(length)], max_length=33, **mode)


def test_ends_without_a_token_to_pad_with_are_refused_as_stock_refuses_them(own: Any, rows: Options) -> None:
    own.generation_config.pad_token_id = None
    own.config.pad_token_id, before = None, own.config.pad_token_id
    try:
        assert_same(own.generate, **rows, stopping_criteria=[EosTokenCriteria(ENDS)], tier=None)
    finally:
        own.config.pad_token_id = before


def test_what_a_processor_raises_reaches_the_caller_and_the_next_call_is_right(patched: Any, rows: Options) -> None:
    class Broken(Recorder):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if len(self.seen) == 3:
                raise ArithmeticError("the fourth is too many")
            return super().__call__(input_ids, scores)

    def fresh() -> Options:
        return {"logits_processor": [Broken()]}

    forms: list[Options] = [{}, {"num_beams": 2}]
    for form in forms:
        options = {**rows, **SHORT, **form}
        got = answer(patched, (), options | fresh())
        expected = answer(patched.stock, (), options | fresh())
        assert repr(got.error) == repr(expected.error) == "ArithmeticError('the fourth is too many')"
        assert_alike(got.seen, expected.seen, "seen")
        assert_same(patched, **options, tier="native")


def test_stop_strings(patched: Any, rows: Options, tokenizer: Any) -> None:
    first = patched.stock(**rows, **SHORT)[:, -7:]
    stops = [tokenizer.decode(first[0, 2:4]), tokenizer.decode(first[2, 4])]
    options = {"stop_strings": stops, "tokenizer": tokenizer, **rows, **SHORT}
    assert_same(patched, **options, eos_token_id=ENDS, tier="native", loop="_sample")
    assert_same(patched, **options, num_beams=2, tier="native", loop="_beam_search")
    assert_same(patched, **options, do_sample=True, **FULL, seed=1, tier="native", loop="_sample")
    assert_same(patched, **rows, **SHORT, stop_strings="a", tier=None)


def test_max_time(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, **SHORT, max_time=1e-9, tier="native", loop="_sample")
    assert_same(patched, **rows, **SHORT, max_time=1e-9, num_beams=2, tier="native", loop="_beam_search")
    assert_same(patched, **rows, **SHORT, max_time=1000.0, tier="native", loop="_sample")


# ---- streamers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_streamer_is_shown_what_stock_shows_it(patched: Any, batch_size: int, do_sample: bool, ends: Any) -> None:
    ids, mask = some_rows((9, 4, 14)[:batch_size])
    options = {"attention_mask": mask, "do_sample": do_sample, "eos_token_id": ends, "pad_token_id": 0}
    loop = "free" if batch_size == 1 and not do_sample else "_sample"
    for seed in range(3):
        got = assert_same(
            patched,
            ids,
            **options,
            max_new_tokens=9,
            fresh=lambda: {"streamer": RecordingStreamer()},
            seed=seed,
            tier="native",
            loop=loop,
        )
        assert got.seen[-1] == ("end",)


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_streamers(patched: Any, tokenizer: Any, capsys: Any, do_sample: bool) -> None:
    ids, mask = some_rows((9,))
    options = {"attention_mask": mask, "do_sample": do_sample, "max_new_tokens": 12, "pad_token_id": 0}

    def texts(generate: Any) -> list[Any]:
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
        answer(generate, (ids,), {**options, "streamer": TextStreamer(tokenizer)})
        answer(generate, (ids,), {**options, "streamer": pieces})
        return [capsys.readouterr().out, list(pieces), asyncio.run(later(generate))]

    async def later(generate: Any) -> list[str]:
        pieces = AsyncTextIteratorStreamer(tokenizer)
        torch.manual_seed(0)
        call = asyncio.to_thread(generate, ids, **options, streamer=pieces)
        _, found = await asyncio.gather(call, collect(pieces))
        return found

    async def collect(pieces: Any) -> list[str]:
        return [piece async for piece in pieces]

    got = texts(patched)
    assert patched.last_report().tier == "native"
    assert got == texts(patched.stock)
    assert len(got[0]) > 12


def test_beams_and_a_streamer_are_refused_as_stock_refuses_them(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, num_beams=2, streamer=RecordingStreamer(), tier=None)


# ---- ways to give the prompt -----------------------------------------------------------------------------------------


def test_prompts_without_a_mask(patched: Any, own: Any) -> None:
    ids, _ = some_rows((9, 9, 9))
    assert_same(patched, ids, max_new_tokens=5, tier="native", loop="free")
    assert_same(patched, ids, max_new_tokens=5, num_beams=2, tier="native", loop="_beam_search")
    padded, _ = some_rows((9, 4, 7))
    assert_same(patched, padded, max_new_tokens=5, pad_token_id=0, tier="native", loop="free")
    assert_same(patched, padded, max_new_tokens=5, pad_token_id=3, tier="native", loop="free")
    own.generation_config.pad_token_id = None
    assert_same(patched, padded, max_new_tokens=5, eos_token_id=88, tier="native", loop="free")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, {"eos_token_id": ENDS}, FULL], ids=str)
def test_ids_of_any_integer_type(patched: Any, rows: Options, dtype: torch.dtype, mode: Options) -> None:
    options = {**rows, "inputs": rows["inputs"].to(dtype), **SHORT, **mode}
    assert_same(patched, **options, tier="native")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_type(patched: Any, rows: Options, dtype: torch.dtype) -> None:
    options = {**rows, "attention_mask": rows["attention_mask"].to(dtype), **SHORT}
    assert_same(patched, **options, tier="native", loop="free")
    assert_same(patched, **options, num_beams=2, tier="native", loop="_beam_search")


def test_prompts_by_position_by_name_and_none_at_all(patched: Any, rows: Options) -> None:
    ids, mask = rows["inputs"], rows["attention_mask"]
    assert_same(patched, ids, None, attention_mask=mask, **SHORT, tier="native", loop="free")
    assert_same(patched, input_ids=ids, attention_mask=mask, **SHORT, tier="native", loop="free")
    assert_same(patched, **SHORT, tier="native", loop="free")
    assert_same(patched, **SHORT, do_sample=True, num_return_sequences=3, tier="native", loop="_sample")
    assert_same(patched, bos_token_id=8, **SHORT, tier="native", loop="free")
    assert_same(patched, ids, input_ids=ids, **SHORT, tier=None)
    assert_same(patched, ids[:, :0], attention_mask=mask[:, :0], **SHORT, tier=None)


def test_position_ids(patched: Any, rows: Options) -> None:
    mask = rows["attention_mask"]
    usual = mask.cumsum(-1) - 1
    assert_same(patched, **rows, **SHORT, position_ids=usual.clamp(min=0), tier="native", loop="free")
    assert_same(patched, **rows, **SHORT, position_ids=usual.masked_fill(mask == 0, 1), tier="native", loop="free")
    ids, _ = some_rows((9, 9))
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9).expand(2, 9), tier="native", loop="free")
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9)[None], tier="native", loop="free")
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9)[None] * 2, tier="cache", loop="_sample")
    assert_same(patched, ids, **SHORT, position_ids=torch.arange(9).expand(2, 9) + 5, tier="cache", loop="_sample")


def test_a_mask_or_positions_of_more_rows_than_the_prompts_fail_as_stock_fails(patched: Any, rows: Options) -> None:
    ids, _ = some_rows((9, 9))
    for odd in ({"attention_mask": torch.ones_like(ids)}, {"position_ids": torch.arange(9).expand(2, 9)}):
        for prompts, name in ((ids[:1], "one row"), (ids.repeat(2, 1), "four rows")):
            expected = answer(patched.stock, (prompts,), {**odd, **SHORT})
            assert expected.error is not None, name
            assert repr(answer(patched, (prompts,), {**odd, **SHORT}).error) == repr(expected.error), name


def test_odd_masks_run_over_blocks_as_stock_runs_them(patched: Any, rows: Options) -> None:
    ids, mask = some_rows((9, 5, 7))
    assert_same(patched, ids.flip(1), attention_mask=mask.flip(1), **SHORT, tier="cache", loop="_sample")
    holes = torch.ones_like(ids)
    holes[:, 3:5] = 0
    options = {"attention_mask": holes, **SHORT}
    assert_same(patched, ids, **options, tier="cache", loop="_sample")
    assert_same(patched, ids, **options, **FULL, num_beams=2, tier="cache", loop="_beam_search")
    assert_same(patched, ids, **options, do_sample=True, num_return_sequences=2, tier="cache", loop="_sample")
    assert_same(patched, ids, **SHORT, attention_mask=torch.zeros_like(ids), tier="cache", loop="_sample")
    assert_same(patched, ids, **SHORT, attention_mask=holes[:, None], tier=None)
    wrong = torch.cat([torch.ones_like(ids), torch.ones_like(ids)], 1)
    assert_same(patched, ids, **SHORT, attention_mask=wrong, tier="cache", loop="_sample")


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_masks_that_say_more_than_yes_and_no_run_over_blocks(patched: Any, rows: Options, value: float) -> None:
    mask = rows["attention_mask"]
    for odd in (mask * value, mask.float().masked_fill(mask == 0, value)):
        assert_same(patched, rows["inputs"], attention_mask=odd, **SHORT, tier="cache", loop="_sample")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_ids_of_other_types_are_refused_as_stock_refuses_them(patched: Any, rows: Options, dtype: torch.dtype) -> None:
    options = {**rows, **SHORT, "inputs": rows["inputs"].to(dtype)}
    expected = answer(patched.stock, (), options)
    assert isinstance(expected.error, RuntimeError)
    assert repr(answer(patched, (), options).error) == repr(expected.error)


@pytest.mark.parametrize("over_budget", ["stock", "raise"])
def test_token_ids_that_the_model_has_not(model: Any, rows: Options, over_budget: str) -> None:
    strict = paged_generate(model, check=False, over_budget=over_budget)
    assert_same(strict, **rows, **SHORT, eos_token_id=[*ENDS, 999, -1], tier="native", loop="free")
    unknown = rows["inputs"].clone()
    unknown[0, -1] = 500
    for form in ({}, {"do_sample": True}, {"num_beams": 2}):
        options = {**rows, **SHORT, **form, "inputs": unknown}
        expected = answer(strict.stock, (), options)
        assert isinstance(expected.error, IndexError)
        assert repr(answer(strict, (), options).error) == repr(expected.error)


def test_tensors_of_inference_mode_are_marked_as_stock_marks_them(patched: Any, rows: Options) -> None:
    with torch.inference_mode():
        assert_same(patched, **rows, **SHORT, tier="native", loop="free")
        assert_same(patched, **rows, **SHORT, **FULL, tier="native", loop="_sample")
    assert_same(patched, **rows, **SHORT, **FULL, num_beams=2, tier="native", loop="_beam_search")


def test_inputs_embeds(model: Any, patched: Any, rows: Options) -> None:
    embeds = model.get_input_embeddings()(rows["inputs"]).detach() * 1.3  # those of no token
    options = {"inputs_embeds": embeds, "attention_mask": rows["attention_mask"], **SHORT}
    assert_same(patched, **options, tier="native", loop="_sample")
    assert_same(patched, **options, **FULL, num_beams=2, tier="native", loop="_beam_search")
    assert_same(patched, rows["inputs"], **options, do_sample=True, tier="native", loop="_sample")


# ---- configurations --------------------------------------------------------------------------------------------------


def test_generation_config_objects_and_what_overrides_them(patched: Any, own: Any, rows: Options) -> None:
    config = GenerationConfig(max_new_tokens=6, num_beams=3, pad_token_id=0, eos_token_id=ENDS)
    before = config.to_dict()
    assert_same(patched, **rows, generation_config=config, tier="native", loop="_beam_search")
    assert_same(patched, rows["inputs"], config, num_beams=1, attention_mask=rows["attention_mask"], tier="native")
    assert_same(patched, **rows, generation_config=config, num_beams=1, max_new_tokens=3, tier="native", loop="free")
    assert config.to_dict() == before
    own.generation_config.update(do_sample=True, top_k=5, max_new_tokens=4, repetition_penalty=1.3)
    assert_same(patched, **rows, tier="native", loop="_sample")
    assert_same(patched, **rows, do_sample=False, repetition_penalty=1.0, tier="native", loop="free")
    assert_same(patched, **rows, generation_config=config, tier="native", loop="_beam_search")
    own.generation_config.return_dict_in_generate = True
    assert_same(patched, **rows, tier="native", loop="_sample")


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 26},
        {"max_length": 5},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"min_length": 90, "max_length": 40},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
        {"num_beams": 0},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": -1.0, "do_sample": True},
        {"top_p": 1.5, "do_sample": True},
        {"top_k": -3, "do_sample": True},
        {"min_p": 3.0, "do_sample": True},
        {"top_h": 0.0, "do_sample": True},
        {"repetition_penalty": -1.0},
        {"bad_words_ids": []},
        {"sequence_bias": {}},
        {"nobody_knows": 1},
        {"max_new_tokenz": 5},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
        {"force_words_ids": [[5]], "num_beams": 2},
        {"dola_layers": "low"},
        {"early_stopping": "sometimes", "num_beams": 2},
        {"cache_implementation": "no such cache"},
        {"low_memory": True, "num_beams": 2},
        {"streamer": 3},
        {"token_healing": True},
        {"watermarking_config": {"greenlist_ratio": 7.0}},
        {"forced_eos_token_id": -1},
        {"inputs": None, "attention_mask": None, "bos_token_id": None},
        {"generation_config": {"max_new_tokens": 4}},
        {"logits_processor": [lambda ids: ids]},
        {"stopping_criteria": [lambda ids, scores: True]},
        {"eos_token_id": 41, "pad_token_id": -1},
        {"assistant_model": "none", "num_beams": 2},
        {CACHE: ((1, 2),)},
    ],
    ids=told,
)
def test_mistakes_are_told_as_stock_tells_them(patched: Any, rows: Options, options: Options) -> None:
    options = {"pad_token_id": 0} | rows | options
    expected = answer(patched.stock, (), options)
    got = answer(patched, (), options)
    assert repr(got.error) == repr(expected.error)
    assert got.warnings == expected.warnings
    assert_alike(got.result, expected.result, "result")


def test_arguments_that_do_not_exist_by_position(patched: Any) -> None:
    expected = answer(patched.stock, tuple(range(30)), {})
    assert isinstance(expected.error, TypeError)
    assert repr(answer(patched, tuple(range(30)), {}).error) == repr(expected.error)


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 3}, {"eos_token_id": ENDS}], ids=str)
def test_the_cache_that_comes_back_is_stocks_and_stock_goes_on_from_it(
    model: Any, patched: Any, rows: Options, mode: Options
) -> None:
    options = {**rows, **SHORT, **FULL, **mode}
    ours = assert_same(patched, **options, tier="native").result
    theirs = answer(patched.stock, (), options).result
    assert type(cache_in_result(ours)) is DynamicCache
    going_on = torch.cat([rows["attention_mask"], rows["attention_mask"].new_ones(4, 7)], 1)[
        :, : ours.sequences.shape[1]
    ]
    found = [
        answer(patched.stock, (each.sequences,), {
            "attention_mask": going_on, CACHE: cache_in_result(each), "pad_token_id": 0, "max_new_tokens": 5
        }).result
        for each in (ours, theirs)
    ]  # fmt: skip
    assert_alike(found[0], found[1], "continued")


def test_a_chat_that_goes_on_with_a_cache_of_the_callers_own(model: Any, patched: Any) -> None:
    first, _ = some_rows((9,))
    more, _ = some_rows((4,), seed=1)

    def chat(generate: Any) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        ids = generate(first, **{CACHE: cache}, max_new_tokens=5)
        assert cache.get_seq_length() == 13
        again = generate(torch.cat([ids, more], 1), **{CACHE: cache}, max_new_tokens=5)
        return [ids, again, cache.layers[0].keys]

    expected = chat(patched.stock)
    assert_alike(chat(patched), expected, "chat")
    assert patched.last_report().tier == "stock"


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}, FULL], ids=str)
def test_no_cache(patched: Any, rows: Options, mode: Options) -> None:
    tier, loop = ("stock", "_beam_search") if "num_beams" in mode else ("native", None)
    assert_same(patched, **rows, **SHORT, use_cache=False, **mode, tier=tier, loop=loop)


def test_a_static_cache_gives_the_same_answers_and_comes_back(patched: Any, rows: Options) -> None:
    options = {**rows, **SHORT, "cache_implementation": "static", "disable_compile": True}
    assert_same(patched, **options, tier="native", loop="free")
    assert_same(patched, **options, num_beams=2, tier="native", loop="_beam_search")
    for mode in ({}, {"num_beams": 2}, {"eos_token_id": ENDS}):
        got = assert_same(patched, **options, **FULL, **mode, tier="native")
        assert type(cache_in_result(got.result)) is StaticCache


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_usual_answers_even_where_stocks_need_an_accelerator(
    patched: Any, rows: Options, kind: str
) -> None:
    got = answer(patched, (), {**rows, **SHORT, "cache_implementation": kind})
    if stock_makes_streams():
        assert got.error is None
        assert patched.last_report().tier == "native"
        assert_alike(got.result, patched.stock(**rows, **SHORT), "result")
    else:  # stock makes the cache before any loop is chosen
        assert isinstance(got.error, RuntimeError)
        assert answer(patched.stock, (), {**rows, **SHORT, "cache_implementation": kind}).error is not None


def stock_makes_streams() -> bool:
    """A torch that was built for a GPU can't where there is none. Its offloaded caches want one at once."""
    return torch.version.cuda is None or torch.cuda.is_available()


def test_a_quantized_cache_is_stocks_business(patched: Any, rows: Options) -> None:
    got = answer(patched, (), {**rows, **SHORT, "cache_implementation": "quantized"})
    expected = answer(patched.stock, (), {**rows, **SHORT, "cache_implementation": "quantized"})
    assert repr(got.error) == repr(expected.error)
    assert_alike(got.result, expected.result, "result")


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_prompts_of_many_steps(patched: Any) -> None:
    ids, mask = some_rows((240, 200, 3, 180, 220, 90, 10, 240))
    options = {"attention_mask": mask, **SHORT}
    assert_same(patched, ids, **options, tier="native", loop="free")
    assert_same(patched, ids, **options, do_sample=True, tier="native", loop="_sample")
    assert_same(patched, ids, **options, num_beams=2, tier="native", loop="_beam_search")


def test_calls_that_may_outgrow_the_models_positions_run_over_blocks(patched: Any) -> None:
    ids, mask = some_rows((250, 240))
    options = {"attention_mask": mask, "pad_token_id": 0}
    assert_same(patched, ids, **options, max_new_tokens=6, tier="native", loop="free")
    assert_same(patched, ids, **options, max_new_tokens=9, tier="cache", loop="_sample")
    assert_same(
        patched,
        ids[:1],
        max_new_tokens=9,
        fresh=lambda: {"streamer": RecordingStreamer()},
        tier="cache",
        loop="_sample",
    )


def test_more_rows_than_run_at_once(patched: Any, rows: Options) -> None:
    many = {name: tensor.repeat(66, 1) for name, tensor in rows.items()}
    assert_same(patched, **many, max_new_tokens=2, pad_token_id=0, tier="native", loop="free")
    assert_same(patched, **many, max_new_tokens=2, pad_token_id=0, do_sample=True, tier="cache", loop="_sample")


def test_a_budget_of_memory(model: Any, rows: Options) -> None:
    ids, mask = some_rows((100, 120, 90, 110))
    small = paged_generate(model, check=False, kv_cache_memory=64 << 10)  # 128 tokens
    assert_same(small, **rows, **SHORT, tier="native", loop="free")
    assert_same(small, ids[:, 10:], attention_mask=mask[:, 10:], **SHORT, tier="native", loop="free")
    assert_same(small, ids, attention_mask=mask, num_beams=4, **SHORT, tier="stock", loop="_beam_search")
    assert "raise kv_cache_bytes" in small.last_report().reason
    strict = paged_generate(model, check=False, kv_cache_memory=64 << 10, over_budget="raise")
    with pytest.raises(ValueError, match="raise kv_cache_bytes"):
        strict(ids, attention_mask=mask, num_beams=4, **SHORT)
    assert_same(strict, **rows, **SHORT, tier="native", loop="free")


def test_a_prompt_computed_in_chunks_of_the_callers_choice(patched: Any, rows: Options) -> None:
    assert_same(patched, **rows, **SHORT, prefill_chunk_size=4, tier="cache", loop="_sample")


def test_autocast(patched: Any, rows: Options) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(patched, **rows, **SHORT, tier="cache", loop="_sample")


# ---- decoding that is not ours ---------------------------------------------------------------------------------------


def test_attentions_and_hidden_states_are_stocks(patched: Any, rows: Options) -> None:
    options = {**rows, **SHORT, "return_dict_in_generate": True}
    assert_same(patched, **options, output_attentions=True, tier="stock", loop="_sample")
    assert_same(patched, **options, output_hidden_states=True, tier="stock", loop="_sample")
    assert_same(patched, **options, output_hidden_states=True, num_beams=2, tier="stock", loop="_beam_search")
    assert_same(patched, **rows, **SHORT, output_hidden_states=True, tier="cache", loop="_sample")


@pytest.mark.parametrize("do_sample", [False, True])
def test_prompt_lookup(patched: Any, do_sample: bool) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    options = {
        "prompt_lookup_num_tokens": 3,
        "max_new_tokens": 12,
        "pad_token_id": 0,
        "eos_token_id": 95,
        "do_sample": do_sample,
    }
    assert_same(patched, ids, **options, tier="cache", loop="_assisted_decoding")
    assert_same(patched, ids, **options, **FULL, tier="cache", loop="_assisted_decoding")


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("assistant_too", [False, True])
def test_an_assistant_model(patched: Any, tiny: Any, do_sample: bool, assistant_too: bool) -> None:
    assistant = tiny("llama", num_hidden_layers=1, hidden_size=32, seed=4)
    if assistant_too:
        assistant.generate = paged_generate(assistant, check=False)
    ids, mask = some_rows((9,))
    options = {"attention_mask": mask, "assistant_model": assistant, "max_new_tokens": 12, "do_sample": do_sample}
    assert_same(patched, ids, **options, pad_token_id=0, tier="cache", loop="_assisted_decoding")


def test_a_models_own_loop_preparation_and_call_are_honoured(tiny: Any, rows: Options) -> None:
    class Prepares(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
            return inputs | {"input_ids": (inputs["input_ids"] + 1) % 90}

    class Loops(LlamaForCausalLM):
        def _sample(self, input_ids: Any, **kwargs: Any) -> Any:
            return super()._sample(input_ids, **kwargs) + 1

    class Calls(LlamaForCausalLM):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            result.logits = result.logits.flip(-1)
            return result

    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    for kind, tier in ((Prepares, "cache"), (Loops, "native"), (Calls, "native")):
        made.__class__ = kind
        assert_same(paged_generate(made, check=False), **rows, **SHORT, tier=tier, loop=None)


def test_hooks_see_the_batches_that_stock_makes(tiny: Any, rows: Options) -> None:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    patched = paged_generate(made, check=False)
    assert_same(patched, **rows, **SHORT, tier="native", loop="free")
    shapes: list[Any] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        shapes.append(output.shape)
        return output * 0.5

    handle = made.model.layers[0].mlp.register_forward_hook(hook)
    assert_same(patched, **rows, **SHORT, tier="cache", loop="_sample")
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    handle.remove()

    def everywhere(module: Any, args: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(module, torch.nn.Linear) else None

    handle = register_module_forward_hook(everywhere)
    try:
        assert_same(patched, **rows, **SHORT, tier="cache", loop="_sample")
    finally:
        handle.remove()
    assert_same(patched, **rows, **SHORT, tier="native", loop="free")


def test_a_decoding_loop_of_the_callers_own(patched: Any, rows: Options) -> None:
    def mine(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        kwargs.pop("synced_gpus", None)
        for key in ("logits_processor", "stopping_criteria", "generation_config"):
            kwargs.pop(key)
        cache = kwargs.pop(CACHE)
        for _ in range(4):
            new = input_ids if not cache.get_seq_length() else input_ids[:, -1:]
            logits = model(new, **{CACHE: cache}, use_cache=True).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmin(-1, keepdim=True)], 1)
        return input_ids

    ids, _ = some_rows((9, 9))
    assert_same(patched, ids, custom_generate=mine, tier="cache", loop="custom_generate")
    assert_same(patched, ids, custom_generate=type(patched.model)._sample, **SHORT, tier="cache")


def test_a_folder_with_a_decoding_loop(patched: Any, tmp_path: Any) -> None:
    (tmp_path / "custom_generate").mkdir()
    code = "def generate(model, inputs, left=1, **kwargs):\n    return model.generate(inputs, max_new_tokens=left)\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(code)
    ids, _ = some_rows((9, 9))
    options = {"custom_generate": str(tmp_path), "left": 4}
    assert_same(patched, ids, **options, trust_remote_code=True, tier="stock", loop="generate")
    assert_same(patched, ids, **options, tier=None)

"""Stock's processors and warpers: greedy, drawn, with weights of 16 bits, and under beams."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from generate_parity import (
    ENDS,
    FULL,
    SHORT,
    EndsAtTurns,
    Options,
    Recorder,
    RecordingStreamer,
    assert_same,
    some_rows,
)
from paged_hf import paged_generate
from rounded_parity import HALVES

WATERMARK = {"greenlist_ratio": 0.3, "bias": 3.0, "seeding_scheme": "selfhash"}


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

"""Models that need a rule, because their attention isn't transformers' own or their positions can't be passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from paged_core import SamplingParams, UnsupportedModel
from paged_hf.model.masks import causal_until, window_of
from paged_hf.model.paged_model import HFPagedModel

NO_KV = {"num_key_value_heads": None, "head_dim": None}
ROTARY = {**NO_KV, "rotary_dim": 8, "intermediate_size": None, "n_inner": 64}
BERT = {**NO_KV, "is_decoder": True}
BART = {**NO_KV, "hidden_size": None, "d_model": 48, "num_attention_heads": None, "num_hidden_layers": None,
        "intermediate_size": None, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
        "decoder_start_token_id": 1}  # fmt: skip
BOTH = {**BART, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}

ALIBI: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", NO_KV),
    "bloom, heads that are no power of two": ("bloom", {**NO_KV, "hidden_size": 96, "num_attention_heads": 6}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "expansion_ratio": 2}),
    "mpt, six heads, clipped": ("mpt", {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 256,
                                        "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3}}),
    "falcon, alibi": ("falcon", {**NO_KV, "alibi": True, "multi_query": False}),
    "falcon, alibi, one kv head": ("falcon", {**NO_KV, "alibi": True}),
}  # fmt: skip
RULED: dict[str, tuple[str, dict[str, Any]]] = {
    **ALIBI,
    "falcon": ("falcon", NO_KV),
    "falcon, many kv heads": ("falcon", {**NO_KV, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, newer": ("falcon", {**NO_KV, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("gptj", ROTARY),
    "codegen": ("codegen", ROTARY),
    "gpt_neo": ("gpt_neo", {**NO_KV, "num_attention_heads": None, "num_hidden_layers": None, "num_heads": 4,
                            "num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 9}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {**NO_KV, "intermediate_size": None, "intermediate_multiple_size": 2}),
    "xglm": ("xglm", {**NO_KV, "d_model": 48, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64}),
    "openai-gpt": ("openai-gpt", {"n_embd": 48, "n_head": 4, "n_layer": 4, "n_positions": 256}),
    "llama4_text": ("llama4_text", {"floor_scale": 8, "attn_scale": 0.5, "no_rope_layers": [1, 0, 1, 0]}),
    "moshi": ("moshi", {"sliding_window": 64, "num_codebooks": 2, "audio_vocab_size": 16, "intermediate_size": None,
                        "ffn_dim": 64}),
    "diffllama": ("diffllama", {"head_dim": None}),
    "hrm_text": ("hrm_text", {"head_dim": None}),
    "rembert": ("rembert", {**BERT, "input_embedding_size": 32, "output_embedding_size": 40}),
    "megatron-bert": ("megatron-bert", BERT),
    "roformer": ("roformer", BERT),
    "roformer, values rotated": ("roformer", {**BERT, "rotary_value": True}),
    "big_bird": ("big_bird", {**BERT, "attention_type": "original_full"}),
    "git": ("git", {**NO_KV, "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                               "intermediate_size": 32, "image_size": 32}}),
    "trocr": ("trocr", BART),
    "whisper": ("whisper", {**BOTH, "max_target_positions": 256, "max_position_embeddings": None}),
    **{name: (name, BOTH) for name in ("bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "plbart",
                                       "mvp")},
}  # fmt: skip
OWN_SIZES = ("mpt", "openai-gpt", "xglm")  # whose configs have other names for all of them


@pytest.fixture(scope="session")
def make(tiny: Any) -> Any:
    """A tiny model by its name in RULED. Positions count: what a model makes of its tokens alone isn't enough."""

    def build(name: str, **own: Any) -> Any:
        family, settings = RULED[name]
        if family in OWN_SIZES:
            others = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", *NO_KV)
            settings = {**dict.fromkeys(others), **settings}
        model = tiny(family, **{**settings, **own})
        for unwanted in ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            setattr(model.generation_config, unwanted, None)
        with torch.no_grad():
            for module_name, module in model.named_modules():
                if isinstance(module, torch.nn.Embedding) and ("position" in module_name or "wpe" in module_name):
                    module.weight.normal_(0, 0.2)
        return model

    return build


@pytest.mark.parametrize("name", RULED)
def test_tokens_and_their_probabilities_are_those_of_stock_generate(
    name: str, make: Any, engine: Any, prompts: Any
) -> None:
    model = make(name)
    expected = [stock_rows(model, prompt, 12) for prompt in prompts]
    running = engine(model, attention_backend="cpu", num_blocks=14)
    compare(engine_rows(running, prompts, 12), expected)
    assert running.last_stats.total_preemptions > 0
    assert {layer.has_key_bias for layer in HFPagedModel(model).spec.layers} == {name in ALIBI}


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_runs_on_the_reference_too(name: str, make: Any, engine: Any, prompts: Any) -> None:
    model = make(name)
    expected = [stock_rows(model, prompt, 5) for prompt in prompts]
    compare(engine_rows(engine(model), prompts, 5), expected)


@pytest.mark.parametrize(("name", "own"), [("mpt", {"max_seq_len": 512}), ("falcon, alibi", {}), ("bloom", {})])
def test_alibi_of_a_long_prompt_is_rounded_as_stock_rounds_it(name: str, own: Any, make: Any, engine: Any) -> None:
    model = make(name, max_position_embeddings=None if name == "mpt" else 512, **own)
    prompt = [3 + 7 * i % 89 for i in range(400)]  # falcon's bias is computed in bfloat16, which counts to 256
    running = engine(model, attention_backend="cpu", num_blocks=120, max_num_batched_tokens=64)
    compare(engine_rows(running, [prompt], 4), [stock_rows(model, prompt, 4)])


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon, alibi", "falcon", "gptj", "bart"])
def test_bfloat16_models_are_taken_in(name: str, make: Any, engine: Any, prompts: Any) -> None:
    rows = engine_rows(engine(make(name).bfloat16(), attention_backend="cpu"), prompts, 5)
    expected = [stock_rows(make(name), prompt, 1) for prompt in prompts]
    for (_, got), (_, want) in zip(rows, expected, strict=True):
        assert got[0] == pytest.approx(want[0], abs=0.2)


def stock_rows(model: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), [row[0].log_softmax(-1).max().item() for row in out.logits]


def engine_rows(running: Any, prompts: Any, num_tokens: int) -> list[tuple[list[int], list[float]]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    for index, prompt in enumerate(prompts):
        running.add_request(str(index), prompt, params)
    while running.has_work:
        for output in running.step():
            assert output.error is None, output.error
            tokens, logprobs = rows[int(output.request.id)]
            tokens += output.token_ids
            logprobs += [chosen[t].logprob for t, chosen in zip(output.token_ids, output.logprobs or (), strict=True)]
    return rows


def compare(got: list[tuple[list[int], list[float]]], expected: list[tuple[list[int], list[float]]]) -> None:
    for (tokens, logprobs), (stock_tokens, stock_logprobs) in zip(got, expected, strict=True):
        assert tokens == stock_tokens
        assert logprobs == pytest.approx(stock_logprobs, abs=5e-4)


# ---- what positions mean ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon, alibi", "bart", "whisper", "roformer", "llama4_text"])
def test_a_token_further_on_has_other_logits(name: str, make: Any, engine: Any) -> None:
    """Else the comparisons above would prove nothing of positions."""
    rows = engine_rows(engine(make(name)), [[5, 9, 5, 9], [5, 9, 5, 9, 5, 9, 5, 9, 5, 9]], 1)
    assert rows[0][1] != pytest.approx(rows[1][1], abs=1e-3)


def test_local_layers_tell_their_window(make: Any) -> None:
    assert [layer.sliding_window for layer in HFPagedModel(make("gpt_neo")).spec.layers] == [None, 9, None, 9]


def test_kv_heads_are_kept_once(make: Any) -> None:
    assert {layer.num_kv_heads for layer in HFPagedModel(make("falcon, newer")).spec.layers} == {2}
    assert {layer.num_kv_heads for layer in HFPagedModel(make("falcon")).spec.layers} == {1}


def test_a_model_knows_whether_stock_counts_its_padding(make: Any, tiny: Any) -> None:
    assert HFPagedModel(make("bart")).counts_padding
    assert not any(HFPagedModel(make(name)).counts_padding for name in ("bloom", "mpt", "gptj"))
    assert not HFPagedModel(tiny("llama")).counts_padding


def test_chunked_attention_and_windows_of_stocks_cache_limit_the_length(make: Any) -> None:
    assert HFPagedModel(make("llama4_text", attention_chunk_size=100)).spec.max_model_len == 100
    assert HFPagedModel(make("llama4_text")).spec.max_model_len == 256
    assert HFPagedModel(make("moshi")).spec.max_model_len == 64
    assert HFPagedModel(make("whisper")).spec.max_model_len == 256


def test_chunks_limit_the_length_even_if_stocks_cache_keeps_everything(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paged_hf.model.paged_model.until_the_cache_forgets", lambda config, layers: 1 << 17)
    assert HFPagedModel(make("llama4_text", attention_chunk_size=100)).spec.max_model_len == 100


@pytest.mark.parametrize(
    ("rule", "window", "chunk"),
    [
        (lambda b, h, q, k: k <= q, None, None),
        (lambda b, h, q, k: (k <= q) & (k > q - 48), 48, 48),
        (lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), "neither", 48),
        (lambda b, h, q, k: k <= q + 1, "neither", None),
        (lambda b, h, q, k: k == k, "neither", None),
        (lambda b, h, q, k: (k <= q) & (k // 48 == q // 48) & (k % 2 == 0), "neither", None),
    ],
    ids=["causal", "window", "chunks", "one ahead", "all", "every other key of chunks"],
)
def test_a_masks_rule_is_told_from_what_it_hides(rule: Any, window: Any, chunk: Any) -> None:
    if window == "neither":
        with pytest.raises(ValueError, match="neither causal nor a sliding window"):
            window_of(rule)
    else:
        assert window_of(rule) == window
    assert causal_until(rule) == chunk


# ---- the user's model stays the user's ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "bart", "xglm", "mpt"])
def test_the_users_model_is_left_as_it_was(name: str, make: Any, engine: Any, prompts: Any) -> None:
    model = make(name)
    before = {path: (dict(module.__dict__), dict(module._buffers)) for path, module in model.named_modules()}
    engine_rows(engine(model), prompts, 2)
    for path, module in model.named_modules():
        attributes, buffers = before[path]
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[key] is value for key, value in attributes.items())
        assert all(module._buffers[key] is value for key, value in buffers.items())


def test_a_step_of_more_tokens_than_the_table_has_positions_leaves_the_table_alone(make: Any, engine: Any) -> None:
    model = make("xglm", max_position_embeddings=24)
    prompts = [[7, 8, 9] * 5, [9, 8] * 6]
    expected = [stock_rows(model, prompt, 3) for prompt in prompts]
    table = model.model.embed_positions.weights
    compare(engine_rows(engine(model, max_num_batched_tokens=64), prompts, 3), expected)
    assert model.model.embed_positions.weights is table


def test_hooks_on_projections_run(make: Any, engine: Any, prompts: Any) -> None:
    model = make("falcon")
    running = engine(model)
    plain = engine_rows(running, prompts, 4)
    handle = model.transformer.h[1].self_attention.dense.register_forward_hook(lambda module, args, out: out * -3)
    assert engine_rows(running, prompts, 4) != plain
    handle.remove()
    assert engine_rows(running, prompts, 4) == plain


def test_weights_changed_between_requests_are_in_the_next_answer(make: Any, engine: Any, prompts: Any) -> None:
    model = make("bloom")
    running = engine(model, attention_backend="cpu")
    engine_rows(running, prompts, 2)
    with torch.no_grad():
        model.transformer.h[0].self_attention.query_key_value.weight.mul_(1.5)
    compare(engine_rows(running, prompts, 5), [stock_rows(model, prompt, 5) for prompt in prompts])


# ---- what a rule doesn't cover ------------------------------------------------------------------------------------


def _eager_falcon(make: Any) -> Any:
    model = make("falcon, alibi")
    model.config._attn_implementation = "eager"  # which adds its ALiBi twice
    return model


def _falcon_with_a_forward_of_the_users(make: Any) -> Any:
    model = make("falcon")
    attention = model.transformer.h[1].self_attention
    attention.forward = attention.forward
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_eager_falcon, "logits differ"),
        (_falcon_with_a_forward_of_the_users, "two prompts stand in one row"),
        (lambda make: make("bloom", slow_but_exact=True, pretraining_tp=2), "slices"),
        (lambda make: make("llama4_text", attention_chunk_size=8), "logits differ"),
        (lambda make: make("trocr", use_learned_position_embeddings=False), "takes no position_ids"),
    ],
)
def test_a_model_that_a_rule_does_not_fit_is_refused(build: Any, reason: str, make: Any) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        HFPagedModel(build(make))


def test_a_mask_that_a_model_makes_itself_is_refused(tiny: Any) -> None:
    with pytest.raises(UnsupportedModel, match="mask that the model makes itself"):
        HFPagedModel(tiny("doge", head_dim=None))


def test_classes_of_the_users_own_get_no_rule(make: Any) -> None:
    model = make("falcon")
    kind = transformers.models.falcon.modeling_falcon.FalconAttention

    class Mine(kind):  # type: ignore[misc, valid-type]
        pass

    model.transformer.h[1].self_attention.__class__ = Mine
    with pytest.raises(UnsupportedModel, match="two prompts stand in one row"):
        HFPagedModel(model)

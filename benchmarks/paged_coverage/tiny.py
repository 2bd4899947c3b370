"""A tiny random model of any model type that transformers knows: its default config, shrunk.

Nothing here knows of paged memory. Settings are shrunk by name, wherever they are; what a model type needs besides is
in ``_OWN``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 128
WINDOW = 8  # of layers with a sliding window
CHUNK = 64  # of attention in chunks, and of windows that exist only in stock's cache
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_NUM_LAYERS = 4
_MOST_LAYERS = 6  # if there are more than four kinds of layers

_AT_MOST = {  # the settings that get a value, unless theirs is smaller
    "n_group topk_group n_groups num_expert_group mamba_n_groups mamba_ngroups first_k_dense_replace n_shared_experts "
    "num_shared_experts moe_num_shared_experts num_dense_layers num_nextn_predict_layers": 1,
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_top_k moe_k num_query_groups depth linear_num_key_heads zero_expert_num num_global_layers": 2,
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_attention_heads_per_layer "
    "num_experts n_routed_experts num_local_experts moe_num_experts linear_num_heads linear_num_value_heads "
    "index_n_heads mamba_n_heads mamba_num_heads n_mamba_heads mamba_dt_rank time_step_rank encoder_layers "
    "num_encoder_layers": 4,
    "sliding_window window_size attention_window_size local_attention sliding_window_size keep_window_size": WINDOW,
    "rotary_dim mamba_d_state ssm_state_size state_size relative_attention_num_buckets num_buckets "
    "mamba_chunk_size chunk_size": 8,
    "head_dim dim_head d_head kv_channels kv_lora_rank q_lora_rank o_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim mamba_d_head mamba_head_dim mamba_headdim "
    "attention_head_size d_kv d_rel adapter_rank laurel_rank hidden_size_per_layer_input": 16,
    "v_head_dim": 24,
    "qk_head_dim index_head_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "router_hidden_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size": 32,
    "hidden_size d_model n_embd emb_dim embedding_dim embedding_size embed_dim word_embed_proj_dim lru_width "
    "hidden_size_global input_embedding_size output_embedding_size backbone_hidden_size intermediate_size n_inner "
    "ffn_dim ffn_hidden_size d_ff dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim dense_intermediate_size "
    "intermediate_size_mlp feed_forward_size attention_hidden_size out_hidden_size mlp_dim mamba_d_ssm "
    "adapter_in_dim adapter_out_dim adapter_input_size": 64,
    "attention_chunk_size": CHUNK,
    "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size pronunciation_vocab_size "
    "shape_vocab_size unpadded_vocab_size": VOCAB,
    "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions max_source_positions context_length "
    "model_max_length": 256,
}  # fmt: skip
_TINY = {name: value for names, value in _AT_MOST.items() for name in names.split()}
_NOT_SETTINGS = (
    "model_type",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "dtype",
    "_name_or_path",
)

_HYBRID = ["linear_attention", "full_attention"] * 2
_SWA = {"num_hidden_layers": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 24}  # fmt: skip
_HEAD_DIM = {"head_dim": 16}
_SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_WIDER = {"per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
            "indexer_compress_ratio": 4}  # fmt: skip
_SLIDES = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
}
_ZAMBA = {"num_hidden_layers": 4, "attention_hidden_size": 128, "attention_head_dim": 32}
_DRAFT = {**_SHARING, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_OWN: dict[str, dict[str, Any]] = {  # further needs of a model type; "default" applies before its settings are shrunk
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "blenderbot": {"decoder_layers": 4, "encoder_layers": 4},
    "blt": {"encoder_hash_byte_group_vocab": 128, "num_hidden_layers": 4},
    "cohere_compass_text": {"default": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"default": {"text_config": _SWA}},
    "dots3_note_text": {"default": _SWA},
    "falcon_h1": {"mamba_n_heads": 8},
    "gemma3n_text": {"default": _SHARING},
    "gemma4": {"default": {"text_config": _SHARING}, "text_config": _WIDER},
    "gemma4_text": {"default": _SHARING, **_WIDER},
    "gemma4_unified": {"default": {"text_config": _SHARING}, "text_config": _WIDER},
    "gemma4_unified_text": {"default": _SHARING, **_WIDER},
    "gemma4_assistant": {"default": {"text_config": _DRAFT}},
    "gemma4_unified_assistant": {"default": {"text_config": _DRAFT}},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": _HYBRID},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _SLIDES,
    "lfm2": {"default": {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mellum": _SLIDES,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": _HEAD_DIM,
    "ministral3": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "moshi": {"sliding_window": CHUNK},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"sliding_window": WINDOW},
    "qwen2": _SLIDES,
    "qwen3": _SLIDES,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48]},
    "starcoder2": {"sliding_window": WINDOW},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 4},
    "zamba": {**_ZAMBA, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {**_ZAMBA, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "n_mamba_heads": 4, "mamba_headdim": 32},
}  # fmt: skip


def model_types() -> list[str]:
    """Every entry of transformers' table of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """The model class of an entry."""
    name: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return name


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of ``model_type``, shrunk as far as its meaning stays the same."""
    kind = CONFIG_MAPPING[model_type]
    own = _OWN.get(model_type, {})
    return kind.from_dict(_merged(_shrunk(kind(**own.get("default", {})).to_dict()), own))


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A causal language model of random weights, in float32, whose greedy tokens vary."""
    torch.manual_seed(seed)
    kind = getattr(transformers, class_name(model_type))
    config = tiny_config(model_type)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config(decoder=True)  # the part that the causal model takes
    model = kind(config).float().eval()
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=1)  # no token ends its answers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "A_log" not in name:
                small = 0.05 if "embed" in name or "wte" in name else 1.7 * weight.shape[-1] ** -0.5
                weight.normal_(0, small)
            elif "sink" in name:
                weight.normal_()
            else:  # norms and biases, so that an omission is noticed
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def narrowed(model: Any, dtype: torch.dtype) -> Any:
    """The model as ``from_pretrained(..., dtype=dtype)`` loads it: what isn't saved keeps its dtype, and so does what
    the model's class wants in float32."""
    wide = [*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())]
    saved = model.state_dict(keep_vars=True)
    for name, tensor in saved.items():
        if tensor.is_floating_point() and not any(part in name for part in wide):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    settings = _fewer_layers({name: value for name, value in settings.items() if name not in _NOT_SETTINGS})
    small = {name: _smaller(str(name), value) for name, value in settings.items()}
    if "is_decoder" in small and not small.get("is_encoder_decoder"):
        small["is_decoder"] = True
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # MLA: every head has its own keys
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, dict) and not name.startswith("rope"):
        return _shrunk(value)
    if name.endswith(("_token_id", "_token_index")):
        return _token(name, value)
    if name not in _TINY:
        return value
    if isinstance(value, list):
        return [_smaller(name, item) for item in value]
    return min(value, _TINY[name]) if isinstance(value, int) and value > 0 else value


def _token(name: str, value: Any) -> Any:
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in fixed:
        return fixed[name]
    return VOCAB - 1 - value % 16 if isinstance(value, int) and value >= VOCAB else value


def _fewer_layers(settings: dict[str, Any]) -> dict[str, Any]:
    """Keep a few layers of each kind, and shorten lists with one item per layer accordingly."""
    count = next((settings[name] for name in _LAYERS if isinstance(settings.get(name), int)), 0)
    if count <= 1:
        return settings
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == count]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * count
    first = [index for index in range(count) if kinds[index] not in kinds[:index]][:_MOST_LAYERS]
    more = [index for index in range(count) if index not in first]
    keep = sorted(first + more[: max(0, _NUM_LAYERS - len(first))])
    return {name: _of_layers(keep, count, name, value) for name, value in settings.items()}


def _of_layers(keep: list[int], count: int, name: str, value: Any) -> Any:
    if name in _LAYERS and value == count:
        return len(keep)
    if name == "per_layer_config" and value:
        return {keep.index(int(layer)): own for layer, own in value.items() if int(layer) in keep}
    return [value[index] for index in keep] if isinstance(value, list) and len(value) == count else value


def _merged(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    for name, value in own.items():
        if name == "default":
            continue
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            value = _merged(settings[name], value)
        settings[name] = value
    return settings

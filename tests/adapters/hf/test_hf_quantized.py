"""Quantised models run as they are: the same tokens as stock generate on the same quantised model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from bitsandbytes_model import bitsandbytes_int8
from paged_hf.loading.load import load_model
from paged_hf.model.paged_model import HFPagedModel


def _wide(tiny: Any) -> Any:
    return tiny("llama", hidden_size=64, intermediate_size=128)  # quantised kernels like multiples of 32


def test_torchao_int8_weights(tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any) -> None:
    from torchao import quantization

    model = _wide(tiny)
    exact = model.lm_head.weight.clone()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.lm_head.weight) is not torch.nn.Parameter
    assert not torch.equal(model.lm_head.weight.dequantize(), exact)
    running = engine(HFPagedModel(model))
    expected = stock(model, prompts, 8)
    assert paged(running, prompts, 8) == expected
    assert paged(running, prompts, 8) == expected, "nothing changed between the two"


def test_bitsandbytes_int8(tiny: Any, stock: Any, paged: Any, prompts: Any, tmp_path: Path) -> None:
    model = bitsandbytes_int8(_wide(tiny), tmp_path)
    model.generation_config.eos_token_id = None
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own, on casts to float16
        assert paged(model, prompts, 8) == stock(model, prompts, 8)


def test_a_gguf_file_is_loaded_dequantised(tiny: Any, stock: Any, paged: Any, prompts: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.Q8_0.gguf"
    _write_gguf(_wide(tiny), path)
    paged_model = load_model(path)
    assert paged_model is not None
    model = paged_model.model
    assert model.config.vocab_size == 96
    assert paged(paged_model, prompts, 8) == stock(model, prompts, 8)


def _write_gguf(model: Any, path: Path) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        name = names.get_name(name, try_suffixes=(".weight",))
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = tensor.float().numpy()
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

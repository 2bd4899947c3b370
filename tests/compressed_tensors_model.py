"""Saves models quantised by compressed-tensors, as users find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "W4A16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "W8A16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, None),
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, _PER_TOKEN),
}


def save_compressed(model: Any, scheme: str, folder: Path) -> None:
    """Save ``model`` with all of its linear layers but the output layer quantised to the nearest integers."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    form, weights, inputs = SCHEMES[scheme]
    args = QuantizationArgs(type="int", symmetric=True, **weights)
    rounding = None if inputs is None else QuantizationArgs(type="int", symmetric=True, **inputs)
    group = QuantizationScheme(targets=["Linear"], weights=args, input_activations=rounding)
    config = QuantizationConfig(config_groups={"group_0": group}, format=form, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and hasattr(layer, "weight_scale"):
            parts = layer.weight.detach().unflatten(1, (-1, args.group_size or layer.weight.shape[1]))
            scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
            layer.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)

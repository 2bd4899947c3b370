"""A model whose linear layers bitsandbytes has quantised to int8, loaded by transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers


def bitsandbytes_int8(model: Any, folder: Path) -> Any:
    """Save ``model`` in ``folder``, and load it again in eight bits."""
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own warnings
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
            device_map="cpu",
        )

"""A model whose linear layers bitsandbytes has made int8, as transformers loads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers


def bitsandbytes_int8(model: Any, folder: Path) -> Any:
    """``model``, saved in ``folder`` and loaded again in eight bits."""
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' own
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
            device_map="cpu",
        )

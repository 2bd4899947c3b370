"""What the engine must know of a model before it runs it: facts of the whole model, and of each attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LayerSpec:
    """The facts of one attention layer. A backend must honour all of them, or refuse the model."""

    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D of queries and keys
    value_head_dim: int  # D of values; differs in MLA models
    scale: float  # factor of q·k
    device: torch.device
    sliding_window: int | None = None  # a query sees keys with key position > query position - window
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    has_sinks: bool = False  # a learned logit for each head joins the softmax's denominator
    has_key_bias: bool = False  # a number for each head and key position is added to the scores, after softcap (ALiBi)


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a model."""

    layers: tuple[LayerSpec, ...]  # one for each call of attend in a forward pass, in layer order
    vocab_size: int
    max_model_len: int  # tokens of a sequence, prompt and output
    dtype: torch.dtype  # of K/V as the model produces them
    device: torch.device  # of token ids and logits
    eos_token_ids: tuple[int, ...] = ()
    name: str = "model"
    sampling_defaults: Mapping[str, float] = field(default_factory=dict, hash=False)  # recommended SamplingParams

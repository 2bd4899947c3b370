"""Facts from a model's own configurations, found without running anything."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache

from paged_core import LayerSpec, UnsupportedModel

_ANY_LENGTH = 1 << 17  # for models without a stated limit
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LENGTHS = (  # names of the maximum number of positions in configs
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_target_positions",
    "seq_length",
)


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile's or PEFT's wrapper.

    Raises:
        UnsupportedModel: there is none, or it has virtual tokens before each prompt.
    """
    model = getattr(model, "_orig_mod", model)
    peft = getattr(model, "active_peft_config", None)
    if peft is not None and hasattr(model, "get_base_model"):
        if getattr(peft, "is_prompt_learning", False):
            raise UnsupportedModel("PEFT prompt learning puts virtual tokens before the prompt; merge or remove it")
        model = model.get_base_model()
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModel(f"{type(model).__name__} isn't a transformers model")
    return model


def refuse_by_config(model: Any) -> None:
    """
    Raises:
        UnsupportedModel: its configuration alone says that it can't run on paged memory.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder model")
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{name} has no language-model head")
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise UnsupportedModel(
            f"{name}'s attention is block-sparse in long prompts; load it with attention_type='original_full'"
        )


def until_the_cache_forgets(config: Any, layers: tuple[LayerSpec, ...]) -> int:
    """The length up to which stock's cache keeps all keys. Some windows exist only in that cache, which drops keys
    silently."""
    if any(layer.sliding_window is not None for layer in layers):
        return _ANY_LENGTH
    cached = DynamicCache(config=config).layers
    windows = [layer.sliding_window for layer in cached if getattr(layer, "is_sliding", False)]
    return min(windows, default=_ANY_LENGTH)


def max_length_of(model: nn.Module, config: Any) -> int:
    """The model's maximum number of positions. If rotary frequencies depend on the longest request of a batch: the
    length up to which they don't."""
    limits = [getattr(config, name, None) for name in _LENGTHS]
    length = next((limit for limit in limits if isinstance(limit, int) and limit > 0), _ANY_LENGTH)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        pairs = [(kinds, parameters)] if isinstance(kinds, str) else [
            (kind, parameters.get(layer) or {}) for layer, kind in (kinds or {}).items()
        ]  # fmt: skip
        for kind, own in pairs:
            if kind in ("dynamic", "longrope"):
                length = min(length, own.get("original_max_position_embeddings") or length)
    return length


def sampling_defaults(model: Any) -> dict[str, float]:
    """Sampling fields of generation_config.json. As in vLLM, do_sample is ignored."""
    generation = getattr(model, "generation_config", None)
    found = {name: getattr(generation, name, None) for name in _SAMPLING}
    return {name: value for name, value in found.items() if value is not None}


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The tokens that end a sequence: those of generation_config.json, else of config.json."""
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

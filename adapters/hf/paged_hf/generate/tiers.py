"""What each tier can answer exactly as stock does. Every function gives the reason why not, or None.

Looked at once for each call, when stock has prepared everything: nothing here repeats its rules for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    PretrainedConfig,
    StoppingCriteria,
)

from paged_hf import upstream
from paged_hf.model.intercepted import interception, modules_of

_OURS = frozenset({"attention_mask", "position_ids", "inputs_embeds", "use_cache", "logits_to_keep", "cache_position"})
_SAME_ANSWERS = (
    None,
    "dynamic",
    "offloaded",
    "static",
    "offloaded_static",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
)


_MEDIA = ("pixel", "image", "video", "audio", "input_features", "input_values", "mm_encoder")


def why_stock(model: nn.Module, input_ids: Tensor, config: Any, loop_kwargs: Mapping[str, Any]) -> str | None:
    """Why no part of the call can be ours. ``config``: the call's GenerationConfig, resolved."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if loop_kwargs.get("synced_gpus"):
        return "synced_gpus: every process must call the model in step with the others"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False) and config.return_dict_in_generate:
            return f"{name} is asked for"
    if config.cache_implementation not in _SAME_ANSWERS:
        return f"cache_implementation={config.cache_implementation!r} is asked for, which gives other answers"
    if getattr(config, "compile_config", None) is not None:
        return "compile_config is set, and stock compiles the model"
    if getattr(config, "is_assistant", False):
        return "the model is another one's assistant"
    media = sorted(name for name in loop_kwargs if _given(loop_kwargs[name]) and any(kind in name for kind in _MEDIA))
    if media:
        return f"it is multimodal: {', '.join(media)}"
    positions = loop_kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[0] not in (1, len(input_ids)):
        return f"position_ids have {positions.shape[0]} rows, the prompts {len(input_ids)}"
    cache = upstream.cache_in(loop_kwargs)
    if cache is not None and not upstream.is_fresh(cache):
        return "a cache of the caller's own was passed"
    if any(module.training for module in modules_of(model)) and (noise := _noise_in_training(model)):
        return f"the model is in training mode and has {noise}: call model.eval() before generate()"
    return None


def why_not_native(
    model: nn.Module, loop: str, input_ids: Tensor, config: Any, kwargs: Mapping[str, Any]
) -> str | None:
    """Why the engine can't run the rows of this call. ``kwargs``: what goes to the model."""
    if loop not in (upstream.SAMPLE, upstream.BEAM_SEARCH):
        return "the engine has no such decoding loop: " + loop.strip("_")
    embeds = kwargs.get("inputs_embeds")
    shape = input_ids.shape if embeds is None else embeds.shape[:2]
    unknown = sorted(name for name in upstream.without_cache(kwargs).keys() - _OURS if _given(kwargs[name]))
    if unknown:
        return f"{', '.join(unknown)} is passed to the model"
    if loop == upstream.BEAM_SEARCH and not kwargs.get("use_cache", True):
        return "beam search without a cache tells nobody which beams go on"
    if getattr(config, "prefill_chunk_size", None) is not None:
        return "prefill_chunk_size is set"
    devices = {input_ids.device.type, model.device.type} - {"meta"}  # where weights are that are offloaded
    if any(map(torch.is_autocast_enabled, devices)):
        return "autocast is on"
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        return f"the prompts are {input_ids.dtype} {list(input_ids.shape)}"
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        if mask.shape != shape:
            return f"the attention mask is {list(mask.shape)}, not {list(shape)} as the prompts"
        real = mask == 1
        if not bool(real.all()) and (odd_padding := _odd_padding(model, input_ids, mask, real)):
            return odd_padding
    if positions is not None:
        usual = torch.arange(shape[1], device=positions.device).expand(shape)
        if mask is not None:
            usual = mask.long().cumsum(-1) - 1
        if positions.shape[-1] != shape[1] or positions.ndim != 2:
            return f"position_ids are {list(positions.shape)}"
        odd = positions != usual
        if bool((odd if mask is None else odd & (mask != 0)).any()):
            return "position_ids aren't those that the attention mask gives"
    if not type(model).prepare_inputs_for_generation.__module__.startswith("transformers."):
        return "its class has a prepare_inputs_for_generation of its own"
    return interception(model)


def runs_free(
    model: nn.Module,
    loop: str,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    config: Any,
    streamer: Any,
    num_rows: int,
) -> bool:
    """Whether each row may run on its own: plain greedy search, of which nobody sees more than the tokens."""
    known = (MaxLengthCriteria, EosTokenCriteria)
    return (
        loop == upstream.SAMPLE
        and upstream.has_the_usual_sampling(type(model))
        and not config.do_sample
        and not config.return_dict_in_generate
        and not len(processors)
        and all(type(criterion) in known for criterion in criteria)
        and (streamer is None or num_rows == 1)
        and (upstream.pad_token(config) is not None or not _ends_at_tokens(criteria))
    )


def may_drop_ended(processors: Sequence[Any], criteria: Sequence[Any], config: Any) -> bool:
    """Whether nobody can tell that rows which have ended are computed no further."""
    stocks_own = all(type(processor).__module__ == LogitsProcessor.__module__ for processor in processors) and all(
        type(criterion).__module__ == StoppingCriteria.__module__ for criterion in criteria
    )
    return _ends_at_tokens(criteria) and stocks_own and not config.return_dict_in_generate


def prompts_of(given: Tensor, mask: Tensor | None) -> list[Any]:
    """``input_ids [B,L]`` without padding, as lists; or ``inputs_embeds [B,L,hidden]``, as tensors."""
    real = None if mask is None else (mask != 0).to(given.device)  # bool [B,L]
    rows = list(given) if real is None else [row[kept] for row, kept in zip(given, real, strict=True)]
    return rows if given.is_floating_point() else [row.tolist() for row in rows]


def fresh_cache(cache: Any) -> bool:
    """Whether it is the cache that stock makes when nobody asks for one."""
    return type(cache) is DynamicCache and not cache.offloading and upstream.is_fresh(cache)


def _ends_at_tokens(criteria: Sequence[Any]) -> bool:
    """Stock's own question: then it pads rows that have ended."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not value)


def _odd_padding(model: nn.Module, input_ids: Tensor, mask: Tensor, real: Tensor) -> str | None:
    """``real bool [B,L]``: where the mask is 1, which it isn't everywhere."""
    if bool(mask[~real].any()):
        return "the attention mask has other values than 0 and 1"
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        return "the attention mask has holes, or padding on the right"
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    if size is not None and input_ids.shape == mask.shape:
        padding = input_ids[~real.to(input_ids.device)]
        if bool(((padding < 0) | (padding >= size)).any()):  # stock looks up padding too, and fails
            return f"the padding holds a token that isn't among the model's {size}"
    return None


def _noise_in_training(model: nn.Module) -> str | None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"dropout ({module.p})"
        if getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing, with which its layers ignore the cache"
    for config in _with_parts(model.config):
        for name, value in vars(config).items():
            elsewhere = name.startswith(("summary_", "classifier_"))  # heads of other tasks
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0 and not elsewhere:
                return f"{name}={value}"
    return None


def _with_parts(config: Any) -> Iterator[Any]:
    """A model's config, and those of its parts."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _with_parts(value)

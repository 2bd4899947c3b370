"""Rules for prepared calls: each looks for one obstacle.

A rule returns the reason why a tier can't answer the call exactly as stock does, or None. The first line of its
docstring says when that is, for docs/generate.md. decide.py has the rules in their order. Some rely on it: they never
see a call that an earlier rule refuses. Stock has prepared and validated the call by then, so nothing here repeats its
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from paged_hf import upstream
from paged_hf.generate.prepared import Prepared
from paged_hf.model.intercepted import compiled_part, interception

_INPUTS = frozenset(
    {"attention_mask", "position_ids", "inputs_embeds", "use_cache", "logits_to_keep", "cache_position"}
)
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

# ---- for all that is ours -------------------------------------------------------------------------------------------


def model_has_an_encoder(call: Prepared) -> str | None:
    """The model is an encoder-decoder model."""
    return "it is an encoder-decoder model" if getattr(call.model.config, "is_encoder_decoder", False) else None


def processes_keep_step(call: Prepared) -> str | None:
    """`synced_gpus` is set: every process calls the model in step with the others."""
    if call.rest.get("synced_gpus"):
        return "synced_gpus: every process must call the model in step with the others"
    return None


def wants_what_forwards_see(call: Prepared) -> str | None:
    """`output_attentions` or `output_hidden_states` is asked for, in a dict."""
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(call.config, name, False) and call.config.return_dict_in_generate:
            return f"{name} is asked for"
    return None


def wants_another_kind_of_cache(call: Prepared) -> str | None:
    """`cache_implementation` names a cache that gives other answers, such as a quantized one."""
    if call.config.cache_implementation not in _SAME_ANSWERS:
        return f"cache_implementation={call.config.cache_implementation!r} is asked for, which gives other answers"
    return None


def wants_to_be_compiled(call: Prepared) -> str | None:
    """`compile_config` is set: stock compiles the model."""
    if getattr(call.config, "compile_config", None) is not None:
        return "compile_config is set, and stock compiles the model"
    return None


def assists_another_model(call: Prepared) -> str | None:
    """The model is the assistant model of another model's call."""
    return "the model is another one's assistant" if getattr(call.config, "is_assistant", False) else None


def brings_media(call: Prepared) -> str | None:
    """The call is multimodal: it has inputs such as pixels or sound."""
    media = sorted(name for name in call.inputs.keys() - _INPUTS if any(kind in name for kind in _MEDIA))
    return f"it is multimodal: {', '.join(media)}" if media else None


def positions_are_for_other_rows(call: Prepared) -> str | None:
    """`position_ids` and the prompts differ in their number of rows."""
    positions = call.positions
    if positions is not None and positions.ndim == 2 and positions.shape[0] not in (1, call.num_rows):
        return f"position_ids have {positions.shape[0]} rows, the prompts {call.num_rows}"
    return None


def cache_is_the_callers(call: Prepared) -> str | None:
    """The cache is the caller's own, or is not empty."""
    if call.cache is not None and not upstream.is_fresh(call.cache):
        return "a cache of the caller's own was passed"
    return None


def trains_with_noise(call: Prepared) -> str | None:
    """The model is in training mode, and has dropout or gradient checkpointing."""
    if any(map(attrgetter("training"), call.modules)) and (noise := _noise_in_training(call)):
        return f"the model is in training mode and has {noise}: call model.eval() before generate()"
    return None


# ---- for the engine -------------------------------------------------------------------------------------------------


def loop_is_unknown(call: Prepared) -> str | None:
    """The engine does not have the decoding loop: assisted or prompt-lookup decoding, a `custom_generate` function."""
    if call.name not in (upstream.SAMPLE, upstream.BEAM_SEARCH):
        return "the engine has no such decoding loop: " + call.name.strip("_")
    return None


def passes_more_to_the_model(call: Prepared) -> str | None:
    """The model is given more inputs than token ids or embeddings, their mask and positions."""
    more = sorted(call.inputs.keys() - _INPUTS)
    return f"{', '.join(more)} is passed to the model" if more else None


def searches_beams_without_a_cache(call: Prepared) -> str | None:
    """Beam search is asked for with `use_cache=False`."""
    if call.name == upstream.BEAM_SEARCH and not call.uses_cache:
        return "beam search without a cache tells nobody which beams go on"
    return None


def prefills_in_chunks(call: Prepared) -> str | None:
    """`prefill_chunk_size` is set."""
    return "prefill_chunk_size is set" if getattr(call.config, "prefill_chunk_size", None) is not None else None


def computes_under_autocast(call: Prepared) -> str | None:
    """Autocast is on."""
    devices = {call.input_ids.device.type, call.device.type} - {"meta"}  # where weights are that are offloaded
    return "autocast is on" if any(torch.is_autocast_enabled(device) for device in devices) else None


def prompts_are_no_rows_of_ids(call: Prepared) -> str | None:
    """The prompts aren't rows of 32-bit or 64-bit token ids."""
    ids = call.input_ids
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        return f"the prompts are {ids.dtype} {list(ids.shape)}"
    return None


def mask_has_another_shape(call: Prepared) -> str | None:
    """The attention mask and the prompts differ in shape."""
    shape = call.prompts.shape[:2]
    if call.mask is not None and call.mask.shape != shape:
        return f"the attention mask is {list(call.mask.shape)}, not {list(shape)} as the prompts"
    return None


def mask_has_other_values(call: Prepared) -> str | None:
    """The attention mask holds values other than 0 and 1."""
    if call.hidden is not None and call.mask is not None and bool(call.mask[call.hidden].any()):
        return "the attention mask has other values than 0 and 1"
    return None


def padding_is_not_on_the_left(call: Prepared) -> str | None:
    """The attention mask has holes, or padding on the right."""
    hidden = call.hidden
    if hidden is not None and bool(hidden[:, -1].any() or (~hidden[:, :-1] & hidden[:, 1:]).any()):
        return "the attention mask has holes, or padding on the right"
    return None


def padding_is_no_token(call: Prepared) -> str | None:
    """The padding holds a token id outside the vocabulary: stock fails on it."""
    hidden, ids = call.hidden, call.input_ids
    if hidden is None or ids.shape != hidden.shape:
        return None
    size = getattr(call.model.get_input_embeddings(), "num_embeddings", None)
    if size is None:
        return None
    padding = ids[hidden.to(ids.device)]
    if bool(((padding < 0) | (padding >= size)).any()):
        return f"the padding holds a token that isn't among the model's {size}"
    return None


def positions_have_another_shape(call: Prepared) -> str | None:
    """`position_ids` and the prompts differ in shape."""
    positions = call.positions
    if positions is not None and (positions.ndim != 2 or positions.shape[-1] != call.prompts.shape[1]):
        return f"position_ids are {list(positions.shape)}"
    return None


def positions_are_unusual(call: Prepared) -> str | None:
    """`position_ids` aren't those that the attention mask gives."""
    mask, positions = call.mask, call.positions
    if positions is None:
        return None
    if mask is None or call.hidden is None:
        usual = torch.equal(positions, torch.arange(positions.shape[1], device=positions.device).expand_as(positions))
    else:
        usual = bool(((positions == mask.long().cumsum(-1) - 1) | (mask == 0)).all())
    return None if usual else "position_ids aren't those that the attention mask gives"


def class_prepares_inputs_otherwise(call: Prepared) -> str | None:
    """The model's class has a `prepare_inputs_for_generation` that isn't from transformers."""
    if not type(call.model).prepare_inputs_for_generation.__module__.startswith("transformers."):
        return "its class has a prepare_inputs_for_generation of its own"
    return None


def someone_sees_batches(call: Prepared) -> str | None:
    """The model has a forward hook, or a method replaced on one of its modules: both may expect whole batches."""
    return interception(call.model, call.modules)


# ---- for a cache in blocks ------------------------------------------------------------------------------------------


def cache_is_not_the_usual(call: Prepared) -> str | None:
    """Stock has prepared a cache other than its `DynamicCache`, or none."""
    cache = call.cache
    if type(cache) is DynamicCache and not cache.offloading and upstream.is_fresh(cache):
        return None
    return "stock doesn't use its usual cache"


def model_is_compiled(call: Prepared) -> str | None:
    """`torch.compile` was applied to the model or a part of it: compiled code works with stock's own caches only."""
    if (compiled := compiled_part(call.model)) is not None:
        return f"{compiled} is compiled, which works with stock's own caches only"
    return None


# ---------------------------------------------------------------------------------------------------------------------


def _noise_in_training(call: Prepared) -> str | None:
    for module in call.modules:
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"dropout ({module.p})"
        if getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing, with which its layers ignore the cache"
    for config in _with_parts(call.model.config):
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

"""Everything that depends on how a release of transformers names and calls things.

A release may rename an argument, an output or a method that is its own. This file finds the present name from
signatures, types and attributes, never from a version number, and no other file of this package contains such a name.
(What
modules of single models are made of stands in model/stand_ins.py.) This file decides nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import Cache, DynamicLayer, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

_KNOWN_TO_WORK = {"5.24.0": "", "5.20.2": " on Python 3.10"}  # the releases that constraints.txt pins


def way_out() -> str:
    """What a user can do if calls don't run as they should, as the end of a sentence."""
    if transformers.__version__ in _KNOWN_TO_WORK:
        return "docs/coverage.md tells which model types do"
    known = ", ".join(f"{version}{where}" for version, where in _KNOWN_TO_WORK.items())
    return f"transformers {transformers.__version__} is installed; known to work: {known}"


# ---- the K/V cache: past_key_values until 5.23, cache from 5.24 on ----------------------------------------------


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which ``forward`` takes its K/V cache; the usual one if its signature doesn't tell."""
    return _typed_as_cache(forward) or CACHE


def _typed_as_cache(function: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(function).parameters.values()
    return next((parameter.name for parameter in parameters if "Cache" in str(parameter.annotation)), None)


CACHE = _typed_as_cache(GenerationMixin.prepare_inputs_for_generation) or "cache"
"""What generate() and its decoding loops call the K/V cache."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The K/V cache among the arguments of a call, under any of its names; None if there is none."""
    return arguments.get(_name_in(arguments))


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call without its K/V cache."""
    name = _name_in(arguments)
    return {other: value for other, value in arguments.items() if other != name}


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a decoding loop with ``cache`` in place of their own."""
    return {**arguments, _name_in(arguments): cache}


def cache_in_result(result: Any) -> Any:
    """The K/V cache in what generate() returns, or None."""
    return cache_in(result) if isinstance(result, Mapping) else None


def set_cache_in_result(result: Any, cache: Any) -> None:
    """Put ``cache`` in place of the one in a result that has one."""
    result[_name_in(result)] = cache


def is_fresh(cache: Any) -> bool:
    """Whether generate() made the cache for this call: it is empty, and not the caller's."""
    if getattr(cache, "_is_user_defined", False):
        return False
    try:
        return not cache.get_seq_length()
    except ValueError:  # none of its layers counts tokens
        return True


def output_with_cache(logits: Tensor, cache: Any) -> Any:
    """A forward's output: ``logits [B,T,vocab]`` and the K/V cache, or None."""
    return CausalLMOutputWithPast(logits=logits, **{_FIELD: cache})


CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
"""Whether a layer's crop(0) empties it. It leaves it as it is where tokens to remove are counted."""

_FIELD = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if "Cache" in str(field.type))


def _name_in(arguments: Mapping[str, Any]) -> str:
    return next((name for name, value in arguments.items() if isinstance(value, Cache)), CACHE)


# ---- decoding loops ---------------------------------------------------------------------------------------------

SAMPLE, BEAM_SEARCH, ASSISTED = "_sample", "_beam_search", "_assisted_decoding"
LOOPS = (SAMPLE, BEAM_SEARCH, ASSISTED)
"""The methods of a model that generate() calls for its decoding modes."""


def has_the_usual_sampling(kind: type) -> bool:
    """Whether a class of models uses the common loop for sampling and greedy search."""
    return getattr(kind, SAMPLE) is getattr(GenerationMixin, SAMPLE)


def pad_token(config: Any) -> int | None:
    """The padding token of ended rows. ``config``: a call's GenerationConfig, as loops get it."""
    token = config._pad_token_tensor
    return None if token is None else int(token)


def answering(call: Callable[..., Any], reorder: Callable[..., Any]) -> dict[str, Any]:
    """Methods for a twin that a loop runs on, while ``call`` computes its outputs and ``reorder`` takes its beams. They
    don't change the model's settings, because other calls may be running."""
    return {
        "__call__": call,
        "_reorder_cache": reorder,
        "_optimize_model_for_decode": lambda self: contextlib.nullcontext(),
        "_valid_auto_compile_criteria": lambda self, *args, **kwargs: False,
    }


# ---- configs and hooks ------------------------------------------------------------------------------------------

ATTENTION = "_attn_implementation_internal"
"""Where a config keeps the name of the attention implementation."""

QUIET = {
    "_output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": False,
}
"""Settings of a config under which a forward returns logits and nothing else."""


def is_recorder(hook: Any) -> bool:
    """Whether a forward hook is the one that remains after a call has asked for hidden states."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_marked_stateful(model: Any) -> bool:
    """Whether a model's class says that it keeps state outside attention. Not all such classes say so."""
    return bool(getattr(model, "_is_stateful", False))


# ---- tensor parallelism -----------------------------------------------------------------------------------------


class Style(enum.Enum):
    """A plan's entry for a module, as far as we know it."""

    SPLIT_OUTPUTS = "each rank has some of the outputs, and keeps them"
    GATHERED_OUTPUTS = "each rank has some of the outputs, and all get all"
    SPLIT_INPUTS = "each rank has some of the inputs, and all get the sums"
    SPLIT_WHOLE_INPUTS = "the same, and the inputs come whole"
    SPLIT_VOCABULARY = "each rank has some of the rows of an embedding"
    REPLICATED = "each rank has all"
    RUNS_LOCALLY = "its forward takes plain shards, and transformers does the rest"


_STYLES = {
    "colwise": Style.SPLIT_OUTPUTS,
    "colwise_gather_output": Style.GATHERED_OUTPUTS,
    "colwise_rep": Style.GATHERED_OUTPUTS,
    "rowwise": Style.SPLIT_INPUTS,
    "rowwise_split_input": Style.SPLIT_WHOLE_INPUTS,
    "rowwise_rep": Style.SPLIT_WHOLE_INPUTS,
    "embedding_rowwise": Style.SPLIT_VOCABULARY,
    "replicated_with_grad_allreduce": Style.REPLICATED,
    "moe_tp_experts": Style.RUNS_LOCALLY,
    "local_params": Style.RUNS_LOCALLY,
    "ep_dispatch_experts": Style.RUNS_LOCALLY,
}
_OF_EXPERTS = "grouped_gemm"  # a plan's name for weights [experts, ...]
_SPLITS_HEADS = {  # projections whose outputs are heads, and the name of their number in configs
    "q_proj": "num_attention_heads",
    "q_b_proj": "num_attention_heads",
    "kv_b_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
    "qkv_proj": "num_key_value_heads",
    "query_key_value": "num_key_value_heads",
}


def can_split() -> bool:
    """Whether we can read how this release splits models."""
    return _distributed_config() is not None and hasattr(transformers.PreTrainedModel, "tp_plan")


def split_over(model: Any, size: int) -> dict[str, Any]:
    """Arguments of from_pretrained with which each rank loads its shard. ``model``: the model without weights. If the
    plan says nothing about a mixture's experts, each rank gets some of them, if they can be divided evenly."""
    config = _distributed_config()
    assert config is not None, "see can_split"
    by_expert = {"ep_size": size} if _can_share_out_experts(model, size) else {}
    return {"distributed_config": config(tp_size=size, **by_expert)}


def _can_share_out_experts(model: Any, size: int) -> bool:
    plan = _ep_plan(model)
    counts = [weight.shape[0] for name, weight in model.named_parameters() if plan.get(_generic(name)) == _OF_EXPERTS]
    return bool(counts) and not any(count % size for count in counts) and not plan.keys() & tp_plan(model).keys()


def tp_plan(model: Any) -> dict[str, str]:
    """Modules and parameters (layers' numbers are ``*``), and how each is split; empty if it is unknown."""
    return dict(model.tp_plan or {})


def styles(model: Any) -> dict[str, Style]:
    """The plans' entries for each module, by its name, as far as we know them."""
    plan = {**_ep_plan(model), **tp_plan(model)}
    said = {name: plan.get(_generic(name)) for name, _ in model.named_modules()}
    return {name: _STYLES[style] for name, style in said.items() if style in _STYLES}


def _ep_plan(model: Any) -> dict[str, str]:
    return dict(getattr(model, "ep_plan", None) or {})


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def split_heads(plan: Mapping[str, str]) -> set[str]:
    """The names in configs of the numbers of heads that a plan splits."""
    split = {name.rpartition(".")[2] for name, style in plan.items() if style == "colwise"}
    return {told for projection, told in _SPLITS_HEADS.items() if projection in split}


def is_sharded(parameter: Any) -> bool:
    """Whether it is a tensor type that holds one rank's part."""
    return hasattr(parameter, "to_local")


def be_quiet() -> None:
    """Turn off progress bars and advice of transformers in this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _distributed_config() -> Any | None:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return None
    return DistributedConfig if "tp_size" in inspect.signature(DistributedConfig).parameters else None

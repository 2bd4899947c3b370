"""One rank's shard of a transformers model, by the model's own tp_plan: each rank reads only what it keeps.

transformers loads the shard, and tells what ranks do together before and after each module. Linear layers, embeddings
and norms are then replaced by plain modules over ordinary tensors, so that packed products and fused decoder layers
recognise them. Other modules stay as transformers made them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from paged_core import ConfigError, Ranks, SplitLinear
from paged_hf import upstream
from paged_hf.upstream import Style


def load_shard(
    what: Any, folder: Path | str, device: str | None, dtype: torch.dtype | str, trust_remote_code: bool, ranks: Ranks
) -> nn.Module:
    """This rank's shard of the model in ``folder``; ``what``: as its user calls it.

    Raises:
        ConfigError: it can't be split over so many ranks, or there are too few devices.
    """
    options = _plan(what, folder, trust_remote_code, ranks.size)
    place = _place(device, ranks)
    if ranks.rank > 0:
        upstream.be_quiet()  # rank 0 says the same
    ranks.join(place)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **options
    )
    _write_down(model, ranks)
    return model


# ---- whether it can be split -----------------------------------------------------------------------------------


def _plan(what: Any, folder: Path | str, trust_remote_code: bool, size: int) -> dict[str, Any]:
    """The arguments with which transformers splits it."""
    if not upstream.can_split():
        raise ConfigError(
            f"tensor_parallel_size is {size}, and this transformers ({transformers.__version__}) can't split "
            "models as we need it; install 5.24 or later, or leave tensor_parallel_size out"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    plan = upstream.tp_plan(model)
    if not plan:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but transformers has no tp_plan for {type(model).__name__} ({what}), so "
            "nobody knows how to split it; leave tensor_parallel_size out"
        )
    text = config.get_text_config()
    for name in upstream.split_heads(plan):
        heads = getattr(text, name, None)
        if isinstance(heads, int) and heads % size:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ConfigError(
                f"tensor_parallel_size is {size}, which doesn't divide the {name} of {what}, {heads}: each rank keeps "
                f"whole heads; use one of {fitting}"
            )
    return upstream.split_over(model, size)


def _place(device: str | None, ranks: Ranks) -> torch.device:
    """The device of this rank: transformers spreads ranks over the accelerators, if there are any."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = "cpu" if kind is None else kind.type
    if device not in (None, "auto", found):
        raise ConfigError(
            f"device is {device!r}, but transformers puts the ranks of a split model on {found!r} here; leave device "
            "out, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to have them on the CPU"
        )
    if found == "cpu":
        return torch.device("cpu")
    if torch.accelerator.device_count() < ranks.size:
        raise ConfigError(
            f"tensor_parallel_size is {ranks.size}, and there are {torch.accelerator.device_count()} devices of type "
            f"{found!r}; use that many at most"
        )
    return torch.device(found, ranks.rank)


# ---- written down plainly --------------------------------------------------------------------------------------


def _write_down(model: nn.Module, ranks: Ranks) -> None:
    """Replace modules in place, since nobody else has the model yet."""
    styles = upstream.styles(model)
    local = _Local()
    for name, module in list(model.named_modules()):
        style = styles.get(name)
        if style is Style.RUNS_LOCALLY:
            local.take(module)
        elif style is Style.SPLIT_VOCABULARY and isinstance(module, nn.Embedding):
            _embedding(module, ranks, local)
        elif style is not None and type(module) is nn.Linear:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, _linear(module, style, ranks, local))
        elif style is Style.REPLICATED:
            module.__dict__.pop("forward", None)


class _Local:
    """Sharded parameters become this rank's plain ones; tied ones stay tied."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, nn.Parameter]] = {}

    def take(self, module: nn.Module) -> None:
        for key, parameter in module._parameters.items():
            if upstream.is_sharded(parameter):
                known = self._known.get(id(parameter))
                if known is None:
                    own = nn.Parameter(parameter.to_local().contiguous(), requires_grad=False)  # type: ignore[union-attr]
                    known = self._known[id(parameter)] = (parameter, own)
                module._parameters[key] = known[1]


def _linear(module: nn.Linear, style: Style, ranks: Ranks, local: _Local) -> nn.Module:
    width = module.out_features
    module.__dict__.pop("forward", None)
    local.take(module)
    if style in (Style.SPLIT_OUTPUTS, Style.REPLICATED):
        module.out_features, module.in_features = module.weight.shape
        return module
    if style is Style.GATHERED_OUTPUTS:
        return SplitLinear(module, partial(ranks.gather, width=width))
    if ranks.rank > 0:
        module._parameters["bias"] = None  # it is added once
    before: Callable[[Tensor], Tensor] | None = ranks.own_columns if style is Style.SPLIT_WHOLE_INPUTS else None
    return SplitLinear(module, ranks.add_up, before)


def _embedding(module: nn.Embedding, ranks: Ranks, local: _Local) -> None:
    """Each rank looks up its part of the vocabulary."""
    whole = module.num_embeddings
    local.take(module)
    module.padding_idx = None  # it matters in training only, and may belong to another rank
    first = ranks.rank * -(-whole // ranks.size)
    module.forward = partial(_looked_up, module, first, ranks.add_up)  # type: ignore[method-assign]


def _looked_up(module: nn.Embedding, first: int, add_up: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    own = input - first
    others = (own < 0) | (own >= module.weight.shape[0])
    found: Tensor = type(module).forward(module, own.masked_fill(others, 0))
    return add_up(found.masked_fill(others[..., None], 0))

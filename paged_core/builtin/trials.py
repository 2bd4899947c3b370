"""Compares forwards with the modules that they replace, on random numbers, before they are used.

All random numbers come from own generators, so that the user's random state stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from paged_core.builtin.modules import head_dim, is_rms_norm
from paged_core.execution.split_linear import SplitLinear

ROWS = 5
ROUGHLY = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of the largest value; for other orders
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # for results that may differ in the last bit


INTEGERS = {torch.float32: 0.2, torch.bfloat16: 0.2}  # for rows that are rounded to eight bits


def tolerances(weights: str | None) -> dict[torch.dtype, float]:
    """Return the tolerances for forwards with weights of this kind."""
    return ROUGHLY if weights is None else INTEGERS


def seen_with(module: nn.Module, weights: dict[int, Tensor]) -> nn.Module:
    """Return the module with other weights ``[N, K]``, by the identity of each part's parameters, or itself if there
    are none. Parts with other weights become plain linear layers."""
    if not weights:
        return module
    if (weight := weights.get(id(module._parameters))) is not None and not isinstance(module, SplitLinear):
        bias = module._parameters.get("bias", module._buffers.get("bias"))
        return _Widened(weight, bias)
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: None if child is None else seen_with(child, weights) for name, child in module._modules.items()
    }
    if weight is not None:
        twin.__dict__["_parameters"] = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin


class _Widened(nn.Module):
    """A linear layer with float32 weights that takes rows of any dtype, and computes as exactly as possible."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight, bias).to(x.dtype)


@torch.no_grad()
def stock(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the module's own forward without hooks."""
    return type(module).forward(module, x)  # type: ignore[no-any-return]


def alike(ours: Tensor, theirs: Tensor, tolerances: dict[torch.dtype, float] = ROUGHLY) -> bool:
    if type(theirs) is not Tensor or ours.shape != theirs.shape or ours.dtype is not theirs.dtype:
        return False
    a, b = ours.float(), theirs.float()
    scale = b.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return torch.allclose(a, b, rtol=0.0, atol=tolerances[ours.dtype] * scale, equal_nan=True)


def random_rows(like: Tensor, width: int) -> Tensor:
    """Return random rows ``[1,ROWS,width]`` of the dtype and on the device of ``like``."""
    return torch.randn(1, ROWS, width, generator=generator()).to(like.device, like.dtype)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def norm_trial(module: nn.Module, dtypes: Sequence[torch.dtype]) -> tuple[nn.Module, Tensor] | None:
    """Return a copy of a module that looks like an RMS norm, and rows for a trial. The copy has random weights, because
    the module's own may give equal results under different formulas."""
    weight = module._parameters.get("weight")
    if not is_rms_norm(module) or weight is None or weight.dtype not in dtypes:
        return None
    twin, random = copy.copy(module), generator()
    twin.__dict__["_parameters"] = {"weight": torch.rand(weight.shape, generator=random).to(weight)}
    return twin, torch.randn(1, ROWS, len(weight), generator=random).to(weight)


def layer_agrees(
    forward: Callable[..., Tensor], layer: nn.Module, x: Tensor, tolerances: dict[torch.dtype, float] = ROUGHLY
) -> bool:
    """Return whether ``forward`` computes what a decoder layer computes of ``x [1,T,N]``, with the arguments that the
    engine gives."""
    dim = head_dim(layer)
    assert dim is not None, "see is_decoder_layer"
    angles = torch.rand(1, x.shape[1], dim // 2, generator=generator()).repeat(1, 1, 2)
    rotation = (angles.cos().to(x), angles.sin().to(x))
    given = {"position_embeddings": rotation, "attention_mask": None, "attend": mixing_attend}
    try:
        with torch.no_grad():
            return alike(forward(x, **given), type(layer).forward(layer, x, **given), tolerances)
    except Exception:  # the layer needs other arguments, or its parts have other shapes
        return False


def mixing_attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    """An ``attend`` for trials: a function of q, k and v that differs for different heads and tokens."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return q.tanh() * k + v.cumsum(0)

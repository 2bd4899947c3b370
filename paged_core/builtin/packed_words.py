"""Linear layers of GPTQ and AWQ: 4-bit or 8-bit codes in 32-bit words, as in their checkpoints.

With ``W = 32 // bits`` codes in a word, inputs K, outputs N and groups of the inputs G:

    GPTQ    qweight [K / W, N], codes of a column one after another, the lowest bits first
    AWQ     qweight [K, N / W], codes of a row, in the order _AWQ
    both    qzeros [G, N / W], in the order of their rows; scales [G, N]: weight = (code - zero) * scale
    GPTQ    g_idx [K], the group of each input; zeros are one less than they should be in files of its first version

The version, and whether the layer is of this kind at all, is found by comparing the layer's own forward on random rows
with the weights that were read. This file recognises torch modules by their tensors, and imports no library. (GPTQ:
arXiv 2210.17323, AWQ: arXiv 2306.00978; layouts as AutoGPTQ, GPTQModel and AutoAWQ write them.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from paged_core.builtin.trials import alike, random_rows

if TYPE_CHECKING:
    from paged_kernels.cpu.integers import Integers

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the places of eight neighbours' codes of a row in a word, lowest bits first
# These allow for rounded scales and sums, but not for rounded rows.
_AGREES = {torch.float32: 5e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}


class _Words(NamedTuple):
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bits: int


def has_packed_words(module: nn.Module) -> bool:
    return _words_of(module) is not None


def of_packed_words(module: nn.Module) -> Integers | None:
    """Return the integers, or None if the layer computes something else, or if its inputs are not grouped in order
    (act-order)."""
    from paged_kernels.cpu.grids import of_known_scales

    words = _words_of(module)
    if words is None:
        return None
    codes, zeros = _codes(words)
    depth, group = len(codes), len(codes) // len(zeros)
    groups = torch.arange(depth) // group
    if words.g_idx is not None and not torch.equal(words.g_idx.long(), groups):
        return None
    scales = words.scales.detach().t().contiguous()
    for missing in (0, 1):  # how much too small the zeros are
        multiples = codes - (zeros + missing)[groups]
        weight = (multiples * words.scales.float()[groups]).t().contiguous()
        if _is_weight_of(module, weight, words.scales.dtype):
            return of_known_scales(weight, scales, group)
    return None


def _words_of(module: nn.Module) -> _Words | None:
    tensors = [module._buffers.get(name, module._parameters.get(name)) for name in ("qweight", "qzeros", "scales")]
    bits = getattr(module, "bits", getattr(module, "w_bit", None))
    if bits not in (4, 8) or any(type(each) not in (Tensor, nn.Parameter) for each in tensors):
        return None
    qweight, qzeros, scales = (each for each in tensors if each is not None)
    words = _Words(qweight, qzeros, scales, module._buffers.get("g_idx"), bits)
    plain = qweight.dtype is qzeros.dtype is torch.int32 and qweight.device.type == "cpu" and scales.is_floating_point()
    return words if plain and qweight.ndim == qzeros.ndim == scales.ndim == 2 and _fits(words) else None


def _fits(words: _Words) -> bool:
    (parts, columns), width = words.scales.shape, 32 // words.bits
    depth = _depth(words)
    return depth > 0 and depth % parts == 0 and words.qzeros.shape == (parts, columns // width)


def _depth(words: _Words) -> int:
    """Return the number of inputs, or 0 if the shapes fit neither format."""
    width, columns = 32 // words.bits, words.scales.shape[1]
    rows, across = words.qweight.shape
    return rows * width if across == columns else rows if across * width == columns else 0


def _codes(words: _Words) -> tuple[Tensor, Tensor]:
    """Return codes ``[K, N]`` and zeros ``[G, N]``, int32."""
    gptq = words.qweight.shape[1] == words.scales.shape[1]
    if gptq:
        codes = _spread(words.qweight.t(), words.bits).t()
        return codes, _spread(words.qzeros, words.bits)
    codes, zeros = (_spread(each, words.bits) for each in (words.qweight, words.qzeros))
    return (_in_order(codes), _in_order(zeros)) if words.bits == 4 else (codes, zeros)


def _in_order(codes: Tensor) -> Tensor:
    """Put AWQ's codes of each eight neighbours in order."""
    return codes.view(len(codes), -1, len(_AWQ))[:, :, torch.tensor(_AWQ)].flatten(1)


def _spread(packed: Tensor, bits: int) -> Tensor:
    """Unpack ``int32 [R, C] -> int32 [R, C * 32 / bits]``, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    spread: Tensor = packed.detach()[:, :, None] >> shifts & 2**bits - 1
    return spread.flatten(1)


@torch.no_grad()
def _is_weight_of(module: nn.Module, weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the layer multiplies by ``weight [N, K]`` and adds its bias, if it has one."""
    bias = module._buffers.get("bias", module._parameters.get("bias"))
    x = random_rows(weight, weight.shape[1]).to(dtype)
    try:
        theirs = type(module).forward(module, x)
    except Exception:  # the layer takes other rows
        return False
    ours = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return alike(ours.to(theirs.dtype), theirs, _AGREES)

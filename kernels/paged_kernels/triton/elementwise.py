"""The small operations between products: norms, rotary, silu. Each reads its input once and does not wait for the
device.

They round where stock modules round: a 16-bit result of an intermediate step is rounded before the next. Launchers have
the signatures of ``paged_kernels.reference``. What a kernel can't take (other dtypes, rows that are not contiguous or
too wide) is computed by the reference. This file knows tensors. It knows no module and no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paged_kernels import reference
from paged_kernels.triton.variants import FUSION, NAMES, Variant, Variants, row_stride

_MAX_WIDTH = 1 << 15  # one program holds a whole row
_SILU_COLUMNS = 1024
_HEADS = 16  # heads that one program rotates


# ---- kernels: 16-bit numbers become float32 as they are read (Triton's interpreter can't compute with bfloat16) -----


@triton.jit
def _normed(values, weight, out, at, width, eps):
    """Return round(values / rms(values)) * weight, for one row of float32 ``values``, which are zero past ``width``."""
    factor = tl.rsqrt(tl.sum(values * values) / width + eps)
    rounded = (values * factor).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32) * rounded, mask=at < width)


@triton.jit
def _rms_norm(x, x_row, weight, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_row + at, mask=at < width, other=0.0).to(tl.float32)
    _normed(values, weight, out + row * width, at, width, eps)


@triton.jit
def _add_rms_norm(x, x_row, residual, residual_row, weight, total, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(residual + row * residual_row + at, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(total.dtype.element_ty)
    tl.store(total + row * width + at, rounded, mask=inside)
    _normed(rounded.to(tl.float32), weight, out + row * width, at, width, eps)


@triton.jit
def _silu_mul(gate, gate_row, up, up_row, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, silu * factor, mask=inside)


@triton.jit
def _turn(x, x_head, out, out_head, cos, sin, first, num_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate some heads of one token: each number of the first half with its partner in the second half."""
    head = first + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (at < half)
    a = tl.load(x + head * x_head + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + head * x_head + half + at, mask=inside, other=0.0).to(tl.float32)
    known = at < half
    cos_a = tl.load(cos + at, mask=known, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + half + at, mask=known, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + at, mask=known, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + half + at, mask=known, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    low = (a * cos_a).to(dtype).to(tl.float32) - (b * sin_a).to(dtype).to(tl.float32)
    high = (b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)
    tl.store(out + head * out_head + at, low, mask=inside)
    tl.store(out + head * out_head + half + at, high, mask=inside)


@triton.jit
def _rotary(
    q,
    q_row,
    q_head,
    q_out,
    q_out_row,
    q_out_head,
    k,
    k_row,
    k_head,
    k_out,
    k_out_row,
    k_out_head,
    cos,
    cos_row,
    sin,
    sin_row,
    num_heads,
    num_kv_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program rotates some heads of q or of k, of one token. ``out`` may be the input itself."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    cos += row * cos_row
    sin += row * sin_row
    num_chunks = tl.cdiv(num_heads, HEADS)
    if chunk < num_chunks:
        x, out = q + row * q_row, q_out + row * q_out_row
        _turn(x, q_head, out, q_out_head, cos, sin, chunk * HEADS, num_heads, half, HEADS, HALF)
    else:
        x, out, first = k + row * k_row, k_out + row * k_out_row, (chunk - num_chunks) * HEADS
        _turn(x, k_head, out, k_out_head, cos, sin, first, num_kv_heads, half, HEADS, HALF)


# ---- launchers -------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x [..., N], weight [N] -> [..., N]``: x / rms(x) in x's dtype, times weight, as Llama does."""
    rows = _rows(x)
    width = rows.shape[1]
    if not _fits(rows, weight) or width > _MAX_WIDTH:
        return reference.rms_norm(x, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        with torch.cuda.device_of(x):
            _rms_norm[(len(rows),)](rows, row_stride(rows), weight, out, width, eps, **_row_tile(width))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``x, residual [..., N], weight [N] -> (their sum, its norm) [..., N]``. The sum is rounded, then
    normed."""
    rows, residuals = _rows(x), _rows(residual)
    width = rows.shape[1]
    if x.shape != residual.shape or not _fits(rows, residuals, weight) or width > _MAX_WIDTH:
        return reference.add_rms_norm(x, residual, weight, eps)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if len(rows):
        with torch.cuda.device_of(x):
            _add_rms_norm[(len(rows),)](
                rows, row_stride(rows), residuals, row_stride(residuals), weight, total, out, width, eps,
                **_row_tile(width),
            )  # fmt: skip
    return total, out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``gate, up [..., N] -> silu(gate) * up [..., N]``. The silu is rounded to gate's dtype before the
    product."""
    gates, ups = _rows(gate), _rows(up)
    if gate.shape != up.shape or not _fits(gates, ups):
        return reference.silu_mul(gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    num_rows, width = gates.shape
    if out.numel():
        grid = (num_rows, triton.cdiv(width, _SILU_COLUMNS))
        with torch.cuda.device_of(gate):
            _silu_mul[grid](gates, row_stride(gates), ups, row_stride(ups), out, width, **_SILU_TILE)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``q [T,H,D], k [T,K,D]`` in place by ``cos, sin [T,rotary_dim]``: the first half with the second half, as
    Llama does. Dimensions past rotary_dim stay as they are."""
    if _can_turn(q, k, cos, sin):
        _launch_rotary(q, q, k, k, cos, sin)
    else:
        reference.rotary(q, k, cos, sin)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same as ``rotary``, into new contiguous tensors."""
    if cos.shape[-1] != q.shape[-1] or not _can_turn(q, k, cos, sin):
        q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
        rotary(q, k, cos, sin)
        return q, k
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch_rotary(q, q_out, k, k_out, cos, sin)
    return q_out, k_out


def _launch_rotary(q: Tensor, q_out: Tensor, k: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor) -> None:
    num_heads, num_kv_heads, half = q.shape[1], k.shape[1], cos.shape[1] // 2
    if not len(q):
        return
    grid = (len(q), triton.cdiv(num_heads, _HEADS) + triton.cdiv(num_kv_heads, _HEADS))
    with torch.cuda.device_of(q):
        _rotary[grid](
            q, *_strides(q), q_out, *_strides(q_out), k, *_strides(k), k_out, *_strides(k_out),
            cos, row_stride(cos), sin, row_stride(sin), num_heads, num_kv_heads, half, **_rotary_tile(half),
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """View ``[..., N]`` as ``[rows, N]``, with each row contiguous."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """Return the strides from token to token and from head to head, as ``row_stride`` does."""
    num_tokens, num_heads, dim = x.shape
    head = x.stride(1) if num_heads > 1 else dim
    return (x.stride(0) if num_tokens > 1 else num_heads * head), head


def _fits(rows: Tensor, *others: Tensor) -> bool:
    """Return whether the kernels can take these: of one supported dtype, on one device, of one width."""
    return rows.dtype in NAMES and all(
        x.dtype is rows.dtype and x.device == rows.device and x.shape[-1] == rows.shape[-1] and x.stride(-1) == 1
        for x in others
    )


def _can_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        q.dtype in NAMES
        and all(x.dtype is q.dtype and x.device == q.device and x.stride(-1) == 1 for x in (q, k, cos, sin))
        and len(q) == len(k) == len(cos) == len(sin)
        and cos.shape[1] == sin.shape[1]
        and cos.shape[1] % 2 == 0
    )


# ---- tiles -----------------------------------------------------------------------------------------------------

_SILU_TILE = {"BLOCK": _SILU_COLUMNS, "num_warps": 4, **FUSION}


def _row_tile(width: int) -> dict[str, int]:
    """Return a tile for one program per row, with up to 64 of its numbers in a thread."""
    block = triton.next_power_of_2(width)
    num_warps = 1 if block <= 256 else 4 if block <= 2048 else 8 if block <= 8192 else 16
    return {"BLOCK": block, "num_warps": num_warps, **FUSION}


def _rotary_tile(half: int) -> dict[str, int]:
    return {"HEADS": _HEADS, "HALF": triton.next_power_of_2(half), "num_warps": 4, **FUSION}


# ---- variants that launchers compile ---------------------------------------------------------------------------


def variants(card: str) -> Variants:
    """Return bfloat16 variants at the sizes of common models."""
    yield from _variants_of("bf16", widths=(128, 4096), halves=(64,))


def more_variants(card: str) -> Variants:
    """Return every dtype, and the widths at which the number of warps changes."""
    for name in NAMES.values():
        yield from _variants_of(name, widths=(64, 256, 2048, 8192, _MAX_WIDTH), halves=(16, 32, 40, 64, 128))


def _variants_of(dtype: str, widths: tuple[int, ...], halves: tuple[int, ...]) -> Variants:
    x, row = f"*{dtype}", "i32:16"
    for width in widths:
        tile = _row_tile(width)
        norm = {"x": x, "x_row": row, "weight": x, "out": x, "width": row, "eps": "fp32"}
        yield Variant.of(_rms_norm, norm, tile)
        norm |= {"residual": x, "residual_row": row, "total": x}
        yield Variant.of(_add_rms_norm, norm, tile)
    yield Variant.of(
        _silu_mul, {"gate": x, "gate_row": row, "up": x, "up_row": row, "out": x, "width": row}, _SILU_TILE
    )
    for half in halves:
        pointers = dict.fromkeys(("q", "q_out", "k", "k_out", "cos", "sin"), x)
        counts = dict.fromkeys(("num_heads", "num_kv_heads", "half"), "i32")
        strides = {f"{name}_row": row for name in pointers}
        heads = {f"{name}_head": row for name in ("q", "q_out", "k", "k_out")}
        yield Variant.of(_rotary, pointers | counts | strides | heads, _rotary_tile(half))

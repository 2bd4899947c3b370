"""Stand-ins for methods of modules that don't use transformers' attention registry (see rules.py). Each function here
takes a twin's module and makes the stand-in for one of its methods. A stand-in calls the module's own projections and
the helpers of the module's own file, and passes queries, keys and values to the step. It knows nothing else: no cache,
no mask, no dropout.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paged_core import UnsupportedModel
from paged_hf.model.attention import CountedAttend, attend_through
from paged_hf.upstream import cache_argument

StandIn = Callable[..., Any]
"""``stand_in(step, *args, **kwargs)``: the arguments of the method it stands for, and what that returns."""


class KeyBias:
    """The ALiBi bias of a model's layers, made on first use: ``f32 [H, max_length]`` with padding, so that kernels may
    read whole vectors."""

    def __init__(self, max_length: int) -> None:
        self._length = max_length + 64
        self._made: dict[Any, Tensor] = {}

    def get(self, like: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(ones i64 [1, length]) -> [H, length]``, for this dtype and device."""
        key = like.dtype, like.device
        if key not in self._made:
            ones = torch.ones(1, self._length, dtype=torch.int64, device=like.device)
            self._made[key] = make(ones).float().contiguous()
        return self._made[key]


def embed_positions(module: nn.Module) -> StandIn:
    """For a table of positions whose rows the decoder counts itself."""
    forward = type(module).forward

    def embed(step: CountedAttend, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        positions = step.positions if position_ids is None else step.positions.view(position_ids.shape)
        return forward(module, *args, position_ids=positions, **kwargs)

    return embed


# ---- modules with a method that does nothing but attend: q, k, v [1,H,T,D] -> [1,H,T,D] -------------------------


def attending(
    scale: Callable[[Any], float], window: Callable[[Any], int | None] = lambda module: None
) -> Callable[[Any, KeyBias], StandIn]:
    """For methods that only attend: ``q, k, v [1,H,T,D], mask -> [1,H,T,D], weights``."""

    def make(module: Any, bias: KeyBias) -> StandIn:
        own_window, own_scale = window(module), scale(module)

        def attend(step: CountedAttend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
            out = attend_through(
                step,
                module,
                q.to(v.dtype),  # codegen rotates in float32
                k.to(v.dtype),
                v,
                mask if own_window is None else None,  # a window that is not in the mask
                scaling=own_scale,
                sliding_window=own_window,
            )
            return out.transpose(1, 2), None

        return attend

    return make


def openai_gpt(module: Any, bias: KeyBias) -> StandIn:
    def attend(step: CountedAttend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any) -> Any:
        scale = q.shape[-1] ** -0.5 if module.scale else 1.0
        out = attend_through(step, module, q, k.transpose(2, 3), v, scaling=scale)
        return [out.transpose(1, 2)]

    return attend


def local_window(module: Any) -> int | None:
    """GPT-Neo's local layers have their window in a buffer: the number of keys that the last row sees."""
    seen = int(module.bias[0, 0, -1].sum())
    return None if seen == module.bias.shape[-1] else seen


# ---- modules that project and attend in one go ------------------------------------------------------------------


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)  # [1,H,T,D]


def as_bart(module: Any, bias: KeyBias) -> StandIn:
    def forward(step: CountedAttend, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        if rest.get("key_value_states") is not None or rest.get("attn_prompt") is not None:
            raise UnsupportedModel(f"{type(module).__name__} attends to more than the tokens before")
        q = module.q_proj(hidden_states) * module.scaling
        q, k, v = (_heads(x, module.head_dim) for x in (q, module.k_proj(hidden_states), module.v_proj(hidden_states)))
        out = attend_through(step, module, q, k, v, attention_mask, scaling=1.0)
        return module.out_proj(out.flatten(2)), None

    return forward


def as_bert(module: Any, bias: KeyBias) -> StandIn:
    def forward(
        step: CountedAttend,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        projections = (module.query, module.key, module.value)
        q, k, v = (_heads(project(hidden_states), module.attention_head_size) for project in projections)
        if sinusoidal_pos is not None:
            if module.rotary_value:
                q, k, v = module.apply_rotary_position_embeddings(sinusoidal_pos, q, k, v)
            else:
                q, k = module.apply_rotary_position_embeddings(sinusoidal_pos, q, k)
        scale = module.attention_head_size**-0.5
        return attend_through(step, module, q, k, v, attention_mask, scaling=scale).flatten(2), None

    return forward


def falcon(module: Any, bias: KeyBias) -> StandIn:
    file = sys.modules[type(module).__module__]

    def forward(
        step: CountedAttend,
        hidden_states: Tensor,
        alibi: Tensor | None = None,  # of the packed row: used only to see that there is one
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **rest: Any,
    ) -> Any:
        q, k, v = module._split_heads(module.query_key_value(hidden_states))  # [1,T,H,D]
        repeats = k.shape[2] // module.num_kv_heads  # the newer architecture repeats kv heads
        q, k, v = q.transpose(1, 2), k[:, :, ::repeats].transpose(1, 2), v[:, :, ::repeats].transpose(1, 2)
        facts: dict[str, Any] = {"scaling": module.inv_norm_factor}
        if alibi is None:
            q, k = file.apply_rotary_pos_emb(q, k, *position_embeddings)
        else:
            facts["key_bias"] = bias.get(q, lambda ones: scaled(ones, q.dtype))
        return module.dense(attend_through(step, module, q, k, v, attention_mask, **facts).flatten(2)), None

    def scaled(ones: Tensor, dtype: torch.dtype) -> Tensor:  # as its SDPA path adds it
        table: Tensor = file.build_alibi_tensor(ones, module.num_heads, dtype)[:, 0] * module.inv_norm_factor
        return table

    return forward


def bloom(module: Any, bias: KeyBias) -> StandIn:
    file = sys.modules[type(module).__module__]

    def forward(step: CountedAttend, hidden_states: Tensor, residual: Tensor, *args: Any, **rest: Any) -> Any:
        if module.pretraining_tp > 1 and module.slow_but_exact:
            raise UnsupportedModel("slow_but_exact adds up its output in slices")
        q, k, v = module._reshape(module.query_key_value(hidden_states))
        alibi = bias.get(q, lambda ones: file.build_alibi_tensor(ones, module.num_heads, q.dtype)[:, 0])
        mask = rest.get("attention_mask")
        out = attend_through(step, module, q, k, v, mask, scaling=module.inv_norm_factor, key_bias=alibi)
        return module.dense(out.flatten(2)) + residual, None

    return forward


def mpt(module: Any, bias: KeyBias) -> StandIn:
    file = sys.modules[type(module).__module__]

    def alibi(ones: Tensor) -> Tensor:
        before_last = file.build_mpt_alibi_tensor(module.n_heads, 2, device=ones.device)[:, 0, :1]  # minus the slopes
        slopes: Tensor = -before_last
        return slopes * (ones.cumsum(-1) - 1)

    def forward(step: CountedAttend, hidden_states: Tensor, *args: Any, **rest: Any) -> Any:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        q, k, v = (_heads(x, module.head_dim) for x in qkv.chunk(3, dim=2))
        facts = {"scaling": module.softmax_scale, "key_bias": bias.get(q, alibi)}
        return module.out_proj(attend_through(step, module, q, k, v, **facts).flatten(2)), None

    return forward


def mpt_model(module: Any, bias: KeyBias) -> StandIn:
    """MPT's model converts the mask that it makes; with our attention there is none."""
    forward: Any = inspect.unwrap(type(module).forward)  # decorators know nothing of masks
    scope = {**forward.__globals__, "create_causal_mask": lambda **named: torch.empty(0)}
    run = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    run.__kwdefaults__ = forward.__kwdefaults__
    return lambda step, *args, **kwargs: run(module, *args, **kwargs)


class _Past:
    """A cache for modules that count positions from its length."""

    def __init__(self, positions: Tensor) -> None:
        self._length = positions - torch.arange(positions.numel(), device=positions.device)

    def get_seq_length(self, *args: Any) -> Tensor:
        return self._length

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v


def llama4(module: Any, bias: KeyBias) -> StandIn:
    forward = type(module).forward
    name = cache_argument(forward)

    def counting(step: CountedAttend, *args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs | {name: _Past(step.positions)})

    return counting


def xglm_positions(module: Any, bias: KeyBias) -> StandIn:
    """Reads the table only: the module's own forward would lengthen the user's table for a step of many tokens."""
    return lambda step, position_ids, *args, **rest: module.weights[position_ids + module.offset]

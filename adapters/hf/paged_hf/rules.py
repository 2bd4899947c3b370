"""Small rules for models whose attention doesn't go through transformers' registry, or whose positions nobody can pass.

A rule stands in for one method of one module of the twin, and only while a step is under way. It calls the module's
own projections and the helpers of the module's own file, hands queries, keys and values to the step, and knows nothing
else. Whether a rule fits the installed version is for the probe to say, which compares logits with stock's.
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
from paged_hf.attention import Step, attend_through
from paged_hf.shadow import Shadow

StandIn = Callable[..., Any]
"""``stand_in(step, *args, **kwargs)``: the arguments of the method it stands for, and what that returns."""


class KeyBias:
    """The ALiBi of a model's layers, made when it is first asked for: ``f32 [H, max_length]`` and a little more, so
    that kernels may read whole vectors."""

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


def apply_rules(shadow: Shadow, under_way: list[Step | None], max_length: int, takes_positions: bool) -> bool:
    """Give the twins their rules. True: positions reach a model whose forward doesn't take them.

    A module that the user has given a forward of his own is left alone.
    """
    bias, placed = KeyBias(max_length), False
    for _, twin in shadow.pairs():
        kind = type(twin)
        library, _, name = kind.__module__.rpartition(".")[0].rpartition(".")
        if library != "transformers.models":
            continue
        known = f"{name}.{kind.__name__}"
        if known in _RULES:
            method, make = _RULES[known]
            placed |= _install(twin, method, make(twin, bias), under_way) and known in _PLACED
        elif not takes_positions and _is_table_of_positions(kind):
            placed |= _install(twin, "forward", _embed_positions(twin), under_way)
    return placed


def _is_table_of_positions(kind: type[nn.Module]) -> bool:
    named_so = kind.__name__.endswith("PositionalEmbedding")
    return named_so and "position_ids" in inspect.signature(kind.forward).parameters


def _install(twin: nn.Module, method: str, stand_in: StandIn, under_way: list[Step | None]) -> bool:
    if method in twin.__dict__ or not hasattr(twin, method):
        return False
    own = getattr(twin, method)

    def either(*args: Any, **kwargs: Any) -> Any:
        step = under_way[0]
        return own(*args, **kwargs) if step is None else stand_in(step, *args, **kwargs)

    twin.__dict__[method] = either
    return True


def _embed_positions(module: nn.Module) -> StandIn:
    """A table of positions whose rows the decoder counts itself."""
    forward = type(module).forward

    def embed(step: Step, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        positions = step.positions if position_ids is None else step.positions.view(position_ids.shape)
        return forward(module, *args, position_ids=positions, **kwargs)

    return embed


# ---- modules with a method that does nothing but attend: q, k, v [1,H,T,D] -> [1,H,T,D] -------------------------


def _attn(scale: Callable[[Any], float], window: Callable[[Any], int | None] = lambda module: None) -> Any:
    def make(module: Any, bias: KeyBias) -> StandIn:
        own_window, own_scale = window(module), scale(module)

        def attend(step: Step, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
            out = attend_through(
                step,
                module,
                q.to(v.dtype),  # codegen rotates in float32
                k.to(v.dtype),
                v,
                mask if own_window is None else None,  # a window that the mask doesn't know
                scaling=own_scale,
                sliding_window=own_window,
            )
            return out.transpose(1, 2), None

        return attend

    return "_attn", make


def _openai_gpt(module: Any, bias: KeyBias) -> StandIn:
    def attend(step: Step, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *rest: Any) -> Any:
        scale = q.shape[-1] ** -0.5 if module.scale else 1.0
        out = attend_through(step, module, q, k.transpose(2, 3), v, scaling=scale)  # its mask is 0 for no padding
        return [out.transpose(1, 2)]

    return attend


def _local_window(module: Any) -> int | None:
    """GPT-Neo's local layers have their window in a buffer: how many keys the last row sees."""
    seen = int(module.bias[0, 0, -1].sum())
    return None if seen == module.bias.shape[-1] else seen


# ---- modules that project and attend in one go ------------------------------------------------------------------


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)  # [1,H,T,D]


def _as_bart(module: Any, bias: KeyBias) -> StandIn:
    def forward(step: Step, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        if rest.get("key_value_states") is not None or rest.get("attn_prompt") is not None:
            raise UnsupportedModel(f"{type(module).__name__} attends to more than the tokens before")
        q = module.q_proj(hidden_states) * module.scaling
        q, k, v = (_heads(x, module.head_dim) for x in (q, module.k_proj(hidden_states), module.v_proj(hidden_states)))
        out = attend_through(step, module, q, k, v, attention_mask, scaling=1.0)
        return module.out_proj(out.flatten(2)), None

    return forward


def _as_bert(module: Any, bias: KeyBias) -> StandIn:
    def forward(
        step: Step,
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


def _falcon(module: Any, bias: KeyBias) -> StandIn:
    file = sys.modules[type(module).__module__]

    def alibi(ones: Tensor, like: Tensor) -> Tensor:  # as its SDPA path adds it
        return file.build_alibi_tensor(ones, module.num_heads, like.dtype)[:, 0] * module.inv_norm_factor

    def forward(
        step: Step,
        hidden_states: Tensor,
        alibi_of_step: Tensor | None,
        attention_mask: Tensor | None,
        **rest: Any,
    ) -> Any:
        q, k, v = module._split_heads(module.query_key_value(hidden_states))  # [1,T,H,D]
        repeats = k.shape[2] // module.num_kv_heads  # the newer architecture repeats its kv heads
        q, k, v = q.transpose(1, 2), k[:, :, ::repeats].transpose(1, 2), v[:, :, ::repeats].transpose(1, 2)
        facts: dict[str, Any] = {"scaling": module.inv_norm_factor}
        if alibi_of_step is None:
            q, k = file.apply_rotary_pos_emb(q, k, *rest["position_embeddings"])
        else:
            facts["key_bias"] = bias.get(q, lambda ones: alibi(ones, q))
        return module.dense(attend_through(step, module, q, k, v, attention_mask, **facts).flatten(2)), None

    def by_name(step: Step, hidden_states: Tensor, alibi: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        return forward(step, hidden_states, alibi, attention_mask, **rest)

    return by_name


def _bloom(module: Any, bias: KeyBias) -> StandIn:
    file = sys.modules[type(module).__module__]

    def forward(step: Step, hidden_states: Tensor, residual: Tensor, *args: Any, **rest: Any) -> Any:
        if module.pretraining_tp > 1 and module.slow_but_exact:
            raise UnsupportedModel("slow_but_exact adds up its output in slices")
        q, k, v = module._reshape(module.query_key_value(hidden_states))
        alibi = bias.get(q, lambda ones: file.build_alibi_tensor(ones, module.num_heads, q.dtype)[:, 0])
        mask = rest.get("attention_mask")
        out = attend_through(step, module, q, k, v, mask, scaling=module.inv_norm_factor, key_bias=alibi)
        return module.dense(out.flatten(2)) + residual, None

    return forward


def _mpt(module: Any, bias: KeyBias) -> StandIn:
    file = sys.modules[type(module).__module__]

    def alibi(ones: Tensor) -> Tensor:
        before_last = file.build_mpt_alibi_tensor(module.n_heads, 2, device=ones.device)[:, 0, :1]  # minus the slopes
        return -before_last * (ones.cumsum(-1) - 1)

    def forward(step: Step, hidden_states: Tensor, *args: Any, **rest: Any) -> Any:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        q, k, v = (_heads(x, module.head_dim) for x in qkv.chunk(3, dim=2))
        facts = {"scaling": module.softmax_scale, "key_bias": bias.get(q, alibi)}
        return module.out_proj(attend_through(step, module, q, k, v, **facts).flatten(2)), None

    return forward


def _mpt_model(module: Any, bias: KeyBias) -> StandIn:
    """It converts the mask that it makes, and with attention of ours there is none."""
    forward = type(module).forward
    scope = {**forward.__globals__, "create_causal_mask": lambda **named: torch.empty(0)}
    run = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    run.__kwdefaults__ = forward.__kwdefaults__
    return lambda step, *args, **kwargs: run(module, *args, **kwargs)


class _Past:
    """What a module that counts its positions from a cache's length needs of it."""

    def __init__(self, positions: Tensor) -> None:
        self._length = positions - torch.arange(positions.numel(), device=positions.device)

    def get_seq_length(self, *args: Any) -> Tensor:
        return self._length

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v


def _llama4(module: Any, bias: KeyBias) -> StandIn:
    forward = type(module).forward

    def counting(step: Step, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(module, *args, past_key_values=_Past(step.positions), **kwargs)

    return counting


def _xglm_positions(module: Any, bias: KeyBias) -> StandIn:
    """The table alone: its own forward would lengthen the user's table for a step of many tokens."""
    return lambda step, position_ids, *args, **rest: module.weights[position_ids + module.offset]


_RULES: dict[str, tuple[str, Callable[[Any, KeyBias], StandIn]]] = {  # class: method, what makes its stand-in
    "gptj.GPTJAttention": _attn(lambda module: 1 / float(module.scale_attn)),
    "codegen.CodeGenAttention": _attn(lambda module: 1 / float(module.scale_attn)),
    "gpt_neo.GPTNeoSelfAttention": _attn(lambda module: 1.0, _local_window),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": _attn(lambda module: 1 / module.norm_factor),
    "openai.Attention": ("_attn", _openai_gpt),
    "xglm.XGLMAttention": ("forward", _as_bart),
    "xglm.XGLMSinusoidalPositionalEmbedding": ("forward", _xglm_positions),
    "trocr.TrOCRAttention": ("forward", _as_bart),
    "mvp.MvpAttention": ("forward", _as_bart),
    "rembert.RemBertSelfAttention": ("forward", _as_bert),
    "megatron_bert.MegatronBertSelfAttention": ("forward", _as_bert),
    "big_bird.BigBirdSelfAttention": ("forward", _as_bert),
    "git.GitSelfAttention": ("forward", _as_bert),
    "roformer.RoFormerSelfAttention": ("forward", _as_bert),
    "falcon.FalconAttention": ("forward", _falcon),
    "bloom.BloomAttention": ("forward", _bloom),
    "mpt.MptAttention": ("forward", _mpt),
    "mpt.MptModel": ("forward", _mpt_model),
    "llama4.Llama4TextAttention": ("forward", _llama4),
}
_PLACED = frozenset({"bloom.BloomAttention", "mpt.MptAttention"})  # positions are in the bias, and nowhere else

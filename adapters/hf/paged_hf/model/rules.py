"""Which modules need a stand-in, because their attention doesn't go through transformers' registry, or because
positions can't be passed to them.

A stand-in replaces one method of one module of the twin, and only while a step is under way. The probe, which compares
logits with stock's, finds out whether it fits the installed version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from paged_hf.model import stand_ins as make
from paged_hf.model.attention import CountedAttend
from paged_hf.model.shadow import Shadow
from paged_hf.model.stand_ins import KeyBias, StandIn

_RULES: dict[str, tuple[str, Callable[[Any, KeyBias], StandIn]]] = {  # class: method, maker of its stand-in
    "gptj.GPTJAttention": ("_attn", make.attending(lambda module: 1 / float(module.scale_attn))),
    "codegen.CodeGenAttention": ("_attn", make.attending(lambda module: 1 / float(module.scale_attn))),
    "gpt_neo.GPTNeoSelfAttention": ("_attn", make.attending(lambda module: 1.0, make.local_window)),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": ("_attn", make.attending(lambda module: 1 / module.norm_factor)),
    "openai.Attention": ("_attn", make.openai_gpt),
    "xglm.XGLMAttention": ("forward", make.as_bart),
    "xglm.XGLMSinusoidalPositionalEmbedding": ("forward", make.xglm_positions),
    "trocr.TrOCRAttention": ("forward", make.as_bart),
    "mvp.MvpAttention": ("forward", make.as_bart),
    "rembert.RemBertSelfAttention": ("forward", make.as_bert),
    "megatron_bert.MegatronBertSelfAttention": ("forward", make.as_bert),
    "big_bird.BigBirdSelfAttention": ("forward", make.as_bert),
    "git.GitSelfAttention": ("forward", make.as_bert),
    "roformer.RoFormerSelfAttention": ("forward", make.as_bert),
    "falcon.FalconAttention": ("forward", make.falcon),
    "bloom.BloomAttention": ("forward", make.bloom),
    "mpt.MptAttention": ("forward", make.mpt),
    "mpt.MptModel": ("forward", make.mpt_model),
    "llama4.Llama4TextAttention": ("forward", make.llama4),
}
_PLACED = frozenset({"bloom.BloomAttention", "mpt.MptAttention"})  # positions are only in the bias


def apply_rules(shadow: Shadow, under_way: list[CountedAttend | None], max_length: int, takes_positions: bool) -> bool:
    """Apply the rules to the twins. True: positions reach a model whose forward doesn't take them. A module whose
    forward the user has replaced is left alone.
    """
    bias, placed = KeyBias(max_length), False
    for _, twin in shadow.pairs():
        kind = type(twin)
        library, _, name = kind.__module__.rpartition(".")[0].rpartition(".")
        if library != "transformers.models":
            continue
        known = f"{name}.{kind.__name__}"
        method, make_stand_in = _RULES.get(known, ("", None))
        if make_stand_in is not None and hasattr(kind, method):  # else the class needs no rule in this release
            placed |= _install(twin, method, make_stand_in(twin, bias), under_way) and known in _PLACED
        elif not takes_positions and _is_table_of_positions(kind):
            placed |= _install(twin, "forward", make.embed_positions(twin), under_way)
    return placed


def _is_table_of_positions(kind: type[nn.Module]) -> bool:
    named_so = kind.__name__.endswith("PositionalEmbedding")
    return named_so and "position_ids" in inspect.signature(kind.forward).parameters


def _install(twin: nn.Module, method: str, stand_in: StandIn, under_way: list[CountedAttend | None]) -> bool:
    if method in twin.__dict__ or not hasattr(twin, method):
        return False
    own = getattr(twin, method)

    def either(*args: Any, **kwargs: Any) -> Any:
        step = under_way[0]
        return own(*args, **kwargs) if step is None else stand_in(step, *args, **kwargs)

    twin.__dict__[method] = either
    return True

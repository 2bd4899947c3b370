"""Which tier one model type runs on, found by running it: the engine, stock's loop over our cache, stock.

This file knows how tiers are called. It knows nothing of processes, tables or the other model types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from paged_core import Engine, EngineConfig, LayerSpec, ModelSpec, SamplingParams, UnsupportedModel
from paged_coverage.answers import (
    NUM_TOKENS,
    DifferentAnswer,
    GeneratedAnswer,
    Tokens,
    alone,
    answer,
    prompts,
    stocks_answer,
)
from paged_coverage.tiny import CHUNK, class_name, narrowed, tiny_model
from paged_hf.cache.paged_cache import PagedCache
from paged_hf.generate.patched import paged_generate
from paged_hf.generate.report import last_report
from paged_hf.upstream import cache_argument

NATIVE, SECOND, STOCK, NOT_BUILT, WRONG = "native", "second tier", "stock", "not built", "WRONG"
TIERS = (NATIVE, SECOND, STOCK, NOT_BUILT, WRONG)
HALVES = (torch.bfloat16, torch.float16)
BUILDING, STOCKS = "building it", "stock's generate"  # steps whose failures are not ours
_TIER_OF = {"native": NATIVE, "cache": SECOND, "stock": STOCK}  # as reports call them

_ENGINES = {
    "the engine with plain attention": EngineConfig(
        block_size=4, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=11, attention_backend="reference",
        fast_forwards=False,
    ),
    "the engine": EngineConfig(num_blocks=64),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One entry of the table."""

    model_type: str
    class_name: str
    tier: str  # one of TIERS: in float32, or WRONG if any dtype is wrong
    reason: str  # native: what its attention is like; else: why it isn't native
    halves: tuple[str, ...] = ()  # the tiers with weights of each dtype of HALVES


def check(model_type: str, at: Callable[[str], None]) -> Row:
    """Build a tiny ``model_type`` and try the tiers, the best one first; ``at`` is called before each step."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # a second thread only costs time for tiny tensors
    tier, reason = _check(model_type, None, at)
    halves = []
    for dtype in HALVES if tier not in (NOT_BUILT, WRONG) else ():
        found, why = _check(model_type, dtype, at)
        halves.append(found)
        if found == WRONG:
            tier, reason = WRONG, f"{_name(dtype)}: {why}"
    return Row(model_type, class_name(model_type), tier, reason, tuple(halves))


def _check(model_type: str, dtype: torch.dtype | None, at: Callable[[str], None]) -> tuple[str, str]:
    told = at if dtype is None else lambda step: at(f"{step}, in {_name(dtype)}")
    told(BUILDING)
    try:
        model = tiny_model(model_type) if dtype is None else narrowed(tiny_model(model_type), dtype)
    except Exception as error:
        return NOT_BUILT, said(error)
    told(STOCKS)
    try:
        stock = stocks_answer(model, prompts())
    except Exception as error:
        return NOT_BUILT, f"stock's own generate fails: {said(error)}"
    try:
        refusal, nature = _engines(model, stock, told)
        tier, reason = _generate(model, stock, refusal, told)
    except DifferentAnswer as difference:
        return WRONG, str(difference)
    except Exception as error:
        return WRONG, said(error)
    return (NATIVE, nature + reason) if tier == NATIVE else (tier, reason)


def _engines(model: Any, stock: GeneratedAnswer, at: Callable[[str], None]) -> tuple[str | None, str]:
    """Why the engine refuses the model, or None; what its attention is like.

    Raises:
        DifferentAnswer: the engine runs it, and its answer differs from stock's.
    """
    nature = ""
    for name, config in _ENGINES.items():
        at(name)
        try:
            engine = Engine(model, config)
        except UnsupportedModel as error:
            return said(error), ""
        rows = _paged(engine)
        if stock.difference(rows):  # stock's own answer may depend on padding, which the engine never sees
            alone(functools.partial(stocks_answer, model)).compare(name, rows)
        nature = _nature(engine.spec)
    return None, nature


def _generate(model: Any, stock: GeneratedAnswer, refusal: str | None, at: Callable[[str], None]) -> tuple[str, str]:
    """The tier of ``paged_generate``, and the reason.

    Raises:
        DifferentAnswer: its answer differs from stock's.
    """
    at("paged_generate")
    generate = paged_generate(model)
    try:
        stock.compare("paged_generate", answer(generate, prompts(), logits=False).rows())
        report = batched = last_report()
        assert batched is not None
        if refusal is None:
            ours = alone(functools.partial(answer, generate))
            alone(functools.partial(stocks_answer, model)).compare("paged_generate, one prompt at a time", ours.rows())
            if _TIER_OF[batched.tier] != NATIVE:
                report = last_report()
    finally:
        generate.release()
    assert report is not None
    tier = _TIER_OF[report.tier]
    if tier == NATIVE:
        return NATIVE, "" if batched.tier == report.tier else f"; padded batches: {_TIER_OF[batched.tier]}"
    if tier == SECOND and not _in_blocks(model):
        tier = STOCK
    return tier, refusal or report.reason or ""


def _in_blocks(model: Any) -> bool:
    """Whether the model really stores K/V in a PagedCache that it gets."""
    cache = PagedCache(model.config.get_text_config(decoder=True))
    try:
        argument = cache_argument(type(model).prepare_inputs_for_generation)
        answer(model.generate, prompts(), **{argument: cache})
    except ValueError:  # it takes no cache
        return False
    return bool(cache.num_blocks_used)


def _paged(engine: Engine) -> list[Tokens]:
    """The same prompts through the engine, all at once."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    rows: dict[str, Tokens] = {}
    for index, prompt in enumerate(prompts()):
        rows[str(index)] = []
        engine.add_request(str(index), prompt, params)
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(f"a request in the engine ended with: {output.error}")
            chosen = zip(output.token_ids, output.logprobs or (), strict=True)
            rows[output.request.id] += [(token, logprobs[token].logprob) for token, logprobs in chosen]
    engine.close()
    return list(rows.values())


def _nature(spec: ModelSpec) -> str:
    """The kind of attention of its layers, in a few words."""
    facts: dict[str, Callable[[LayerSpec], bool]] = {
        "grouped queries": lambda layer: layer.num_kv_heads < layer.num_heads,
        "sliding window": lambda layer: layer.sliding_window is not None,
        "softcap": lambda layer: layer.softcap is not None,
        "sinks": lambda layer: layer.has_sinks,
        "ALiBi": lambda layer: layer.has_key_bias,
        "values narrower than keys": lambda layer: layer.value_head_dim < layer.head_dim,
    }
    words = [name for name, holds in facts.items() if any(map(holds, spec.layers))]
    if len({(layer.num_kv_heads, layer.head_dim) for layer in spec.layers}) > 1:
        words.append("layers of different widths")
    if spec.max_model_len <= CHUNK:
        words.append("sequences within its window or chunk only")
    return ", ".join(words) or "full attention"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UnsupportedModel) else f"{type(error).__name__}: {text}"

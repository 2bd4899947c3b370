"""Before a model is patched: each tier answers a few tokens beside stock. A tier that differs is not used."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from paged_hf.generate import loops
from paged_hf.generate.report import last_report, trying
from paged_hf.model.probe import difference, tolerance

_log = logging.getLogger("paged_hf")
_NUM_NEW = 3
_LONGEST = 64  # windows up to here are outgrown by the longer prompt


def run(ways: loops.Tiers) -> None:
    """Try every tier of ``ways`` on two prompts, the shorter one padded on the left, and drop those that differ."""
    if getattr(ways.model.config, "is_encoder_decoder", False):
        return
    with trying():
        try:
            expected = _answer(ways.model, ways.model)
        except Exception as error:
            _log.debug("no self-check: stock's own generate() fails on a plain prompt: %r", error)
            return
        for tier in ("native", "cache"):
            _try(ways, tier, expected)


def _try(ways: loops.Tiers, tier: str, expected: Any) -> None:
    alone = loops.Tiers(ways.model, ways.host, strict_memory=False)
    alone.dropped = {other: "not this time" for other in ("native", "cache") if other != tier}
    try:
        got = _answer(ways.model, loops.view(ways.model, alone), use_cache=tier == "cache")
    except Exception as error:
        _drop(ways, tier, f"it fails on a plain prompt: {error!r}")
        return
    report = last_report()
    if tier in alone.dropped:  # it has found out by itself that it can't
        ways.dropped[tier] = alone.dropped[tier]
    elif report is not None and report.tier == tier and (error := _error(got, expected)) > tolerance(got.logits[0]):
        _drop(ways, tier, f"its logits differ from stock's by {error:.2g} of their deviation")


def _answer(model: nn.Module, seen: Any, use_cache: bool = True) -> Any:
    """Greedy tokens and logits of the prompts; ``seen``: the model, or a view of it. The engine always has a cache, and
    which one comes back is not of interest."""
    ids, mask = _prompts(model)
    return type(model).generate(  # type: ignore[attr-defined]
        seen,
        ids,
        attention_mask=mask,
        max_new_tokens=_NUM_NEW,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=use_cache,
    )


def _drop(ways: loops.Tiers, tier: str, why: str) -> None:
    ways.dropped[tier] = f"self-check: {why}"
    _log.warning("paged_generate won't use the %s tier for %s: %s", tier, type(ways.model).__name__, why)


def _prompts(model: nn.Module) -> tuple[Tensor, Tensor]:
    """``i64 [2, L]`` and its mask: the second row is half as long."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None) or 0
    length = window + 3 if 0 < window <= _LONGEST else 12
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : length // 2] = 0
    return ids.to(device), mask.to(device)


def _error(got: Any, expected: Any) -> float:
    """The largest difference at a step, rows compared as long as their tokens agree."""
    worst, width = 0.0, expected.sequences.shape[1] - len(expected.logits)
    for row in range(len(expected.sequences)):
        for step, (ours, theirs) in enumerate(zip(got.logits, expected.logits, strict=False)):
            worst = max(worst, difference(ours[row], theirs[row]))
            if got.sequences[row, width + step] != expected.sequences[row, width + step]:
                break
    return worst

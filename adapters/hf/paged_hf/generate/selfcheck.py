"""The self-check before a model is patched: each tier and stock answer a few tokens. A tier that differs is not used.

All are forced through the same tokens, so that every step can be compared. Stock's own run also shows whether its cache
and the paged cache hold the same bits; only if they don't, the cache tier is run separately. With 16-bit weights, both
stock and ours are compared with a float32 reading of the same weights, because their distance alone can't tell rounding
from a mistake.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from paged_core import UnsupportedModel
from paged_hf.cache.compared_cache import ComparedCache
from paged_hf.generate import loops
from paged_hf.generate.carry_out import as_stock
from paged_hf.generate.decide import OverBlocks, decide
from paged_hf.generate.prepared import Prepared
from paged_hf.generate.report import Tier, forget, last_report, trying
from paged_hf.generate.tiers import Tiers
from paged_hf.model.rounding import allowed_beside, difference, narrow_dtype, reading, tolerance

_log = logging.getLogger("paged_hf")
_NUM_NEW = 3
_NUM_TRIES = 3  # questions that a tier must get wrong to be dropped: rounding may choose other experts
_KEPT_SETTINGS = ("pad_token_id", "bos_token_id", "decoder_start_token_id")
_LONGEST = 64  # the longer prompt exceeds windows up to this size


def run(tiers: Tiers) -> str | None:
    """Try every tier of ``tiers`` on two prompts, the shorter one padded on the left, and drop those that differ.

    The model is left as it was, and so are the random numbers that the caller will draw. Returns why plain greedy calls
    won't run natively; None: they will.
    """
    if getattr(tiers.model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    with trying(), _random_numbers_kept(tiers.model):
        model = _stand_in(tiers.model)
        beside = _Beside(model)

        @functools.cache
        def ask(seed: int) -> _StockAnswer:
            return _StockAnswer.of(model, seed, beside)

        try:
            ask(0)
        except Exception as error:
            return f"stock's own generate() fails on a plain prompt: {error!r}"
        proven = beside.same
        _try(tiers, model, "native", ask)
        if not proven:
            _try(tiers, model, "cache", ask)
        return tiers.dropped.get("native") or _obstacle(tiers, model, ask(0).question)


def _obstacle(tiers: Tiers, model: nn.Module, question: _Question) -> str | None:
    """Why a plain call isn't answered natively: a release may pass something unknown to its loops."""
    forget()
    alone = Tiers(model, tiers.host, strict_memory=False)
    alone.dropped = dict(tiers.dropped)
    question.put_plainly_to(loops.twin(model, alone))
    report = last_report()
    if report is None:
        return "stock's generate() calls none of the decoding loops that are known"
    return None if report.tier == "native" else report.reason


class _Beside:
    """Stock's own way to answer, with a paged cache beside its cache. ``same``: whether they never differed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.same = False

    def put(self, question: _Question) -> Tensor:
        """Logits ``[steps, rows, vocab]`` of stock's."""
        self.same = False
        try:
            return question.put_to(loops.twin(self.model, self))
        except Exception:  # stock's own run will show whether the failure is stock's
            self.same = False
            return question.put_to(self.model)

    def answer(self, call: Prepared) -> Any:
        decision = decide(call, {"native": "it is stock that is asked"})
        cache = self._cache() if isinstance(decision, OverBlocks) else None
        if cache is None:
            return as_stock(call, "it is stock that is asked")
        result = call.run(call.model, cache=cache)
        self.same = cache.same
        return result

    def _cache(self) -> ComparedCache | None:
        with suppress(UnsupportedModel):
            return ComparedCache(self.model.config.get_text_config(decoder=True))
        return None


def _try(tiers: Tiers, model: Any, tier: Tier, ask: Callable[[int], _StockAnswer]) -> None:
    alone = Tiers(model, tiers.host, strict_memory=False)
    other: Tier = "cache" if tier == "native" else "native"
    alone.dropped = {other: "not this time"}
    why: str | None = None
    for seed in range(_NUM_TRIES):
        trial = ask(seed)
        try:
            got = trial.question.put_to(loops.twin(model, alone), use_cache=tier == "cache")
        except Exception as error:
            why = f"it fails on a plain prompt: {error!r}"
            break
        report = last_report()
        if tier in alone.dropped:  # the tier itself has refused the model
            tiers.refuse(tier, alone.dropped[tier])
            return
        why = trial.fault(got) if report is not None and report.tier == tier else None
        if why is None:
            return
    tiers.dropped[tier] = f"self-check: {why}"
    if tier != "native":  # for which the caller warns
        _log.warning("paged_generate won't use the %s tier for %s: %s", tier, type(tiers.model).__name__, why)


@dataclass(frozen=True)
class _StockAnswer:
    """A question, and stock's answer."""

    question: _Question
    expected: Tensor  # [steps, rows, vocab]
    exact: Tensor | None  # the same in float32; None if the weights are float32 already
    dtype: torch.dtype  # of the weights, or the coarsest of them

    @classmethod
    def of(cls, model: nn.Module, seed: int, stock: _Beside) -> _StockAnswer:
        question, narrow = _Question.about(model, seed), narrow_dtype(model)
        expected = stock.put(question)
        exact = None if narrow is None else reading(lambda: question.put_to(model))
        return cls(question, expected, exact, narrow or expected.dtype)

    def fault(self, got: Tensor) -> str | None:
        """What is wrong with the logits ``got [steps, rows, vocab]``."""
        if self.exact is None:
            error, allowed = _distances(got, self.expected).max().item(), tolerance(self.dtype)
            return None if error <= allowed else f"its logits differ from stock's by {error:.2g} of their deviation"
        stocks = _distances(self.expected, self.exact)
        for row, ours in enumerate(_distances(got, self.exact).median(dim=0).values.tolist()):
            own = max(stocks[:, row].median().item(), stocks.median().item())
            if not ours <= allowed_beside(own, self.dtype):
                return (
                    f"its logits differ from what its weights give in float32 by {ours:.2g} of their deviation, "
                    f"stock's by {own:.2g}"
                )
        return None


@dataclass(frozen=True)
class _Question:
    """Two prompts, and the fixed tokens of their answers, whatever the logits are."""

    ids: Tensor  # i64 [2, L]; the second row is half as long
    mask: Tensor  # i64 [2, L]
    answers: Tensor  # i64 [2, _NUM_NEW]

    @classmethod
    def about(cls, model: Any, seed: int) -> _Question:
        text = model.config.get_text_config(decoder=True)
        window = getattr(text, "sliding_window", None) or 0
        length = window + 3 if 0 < window <= _LONGEST else 12
        device = model.get_input_embeddings().weight.device
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(text.vocab_size, (2, length + _NUM_NEW), generator=generator).to(device)
        mask = torch.ones_like(ids[:, :length])
        mask[1, : length // 2] = 0
        return cls(ids[:, :length], mask, ids[:, length:])

    def put_to(self, seen: Any, use_cache: bool = True) -> Tensor:
        """Logits ``[steps, rows, vocab]`` of the model, or of a twin of it. The engine always has a cache, and which
        one comes back does not matter."""
        output = type(seen).generate(
            seen,
            self.ids,
            attention_mask=self.mask,
            max_new_tokens=_NUM_NEW,
            do_sample=False,
            num_beams=1,
            logits_processor=[_Leading(self.answers)],
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=use_cache,
        )
        return torch.stack(output.logits)

    def put_plainly_to(self, seen: Any) -> None:
        """Only the tier that runs the call matters, not its answer, so a few tokens are enough."""
        ids, mask = self.ids[:, -2:], torch.ones_like(self.mask[:, -2:])
        mask[1, 0] = 0
        type(seen).generate(seen, ids, attention_mask=mask, max_new_tokens=1, do_sample=False, num_beams=1)


class _Leading(LogitsProcessor):  # type: ignore[misc]
    """Forces each row to its fixed tokens."""

    def __init__(self, answers: Tensor) -> None:
        self._next = iter(answers.T)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        told = next(self._next).to(scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(1, told, 0.0)


def _distances(got: Tensor, want: Tensor) -> Tensor:
    """``f32 [steps, rows]``: the distance of their logits."""
    return torch.tensor([[difference(*row) for row in zip(*step, strict=True)] for step in zip(got, want, strict=True)])


def _stand_in(model: nn.Module) -> Any:
    """The model over a dictionary of its own, into which generate() may write, and with none of the settings for which
    generate() would compile it or choose another loop."""
    seen: Any = copy.copy(model)
    settings = GenerationConfig().to_dict()
    for name in _KEPT_SETTINGS:
        settings.pop(name, None)
    seen.generation_config = copy.deepcopy(seen.generation_config)
    seen.generation_config.update(**settings)
    return seen


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        yield

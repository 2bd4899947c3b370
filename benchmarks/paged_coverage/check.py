"""Which tier one model type runs on, found by running it: the engine, stock's loop over our cache, stock.

This file knows how tiers are called and when two answers are the same. It knows nothing of processes, tables or the
other model types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from paged_hf.cache.paged_cache import PagedCache
from paged_hf.generate.patched import paged_generate
from paged_hf.generate.report import last_report
from paged_hf.upstream import cache_argument
from torch import Tensor

from paged_core import Engine, EngineConfig, LayerSpec, ModelSpec, SamplingParams, UnsupportedModel
from paged_coverage.tiny import CHUNK, WINDOW, class_name, tiny_model

NATIVE, SECOND, STOCK, NOT_BUILT, WRONG = "native", "second tier", "stock", "not built", "WRONG"
TIERS = (NATIVE, SECOND, STOCK, NOT_BUILT, WRONG)
_TIER_OF = {"native": NATIVE, "cache": SECOND, "stock": STOCK}  # as reports call them

_LENGTHS = (5, 3 * WINDOW + 2, 14)  # of the prompts: mixed, one longer than any window
_NUM_TOKENS = 12
_TIE = 1e-4  # where stock's two best logits are nearer than this, rounding decides
_LOGPROB = 1e-3  # that a token's log-probability may be off by
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
    tier: str  # one of TIERS
    reason: str  # native: what its attention is like; else: why it isn't native


Tokens = list[tuple[int, float | None]]
"""The new tokens of a prompt, each with its log-probability where that is known."""


class DifferentAnswer(Exception):
    """Ours isn't stock's; the message says whose, and where they differ first."""


@dataclass(frozen=True)
class Answer:
    """What a generate() says to some prompts."""

    tokens: Tensor  # i64 [rows, _NUM_TOKENS]
    logits: Tensor | None = None  # f32 [_NUM_TOKENS, rows, vocab]

    def rows(self) -> list[Tokens]:
        if self.logits is None:
            return [[(token, None) for token in row] for row in self.tokens.tolist()]
        chosen = self.logits.log_softmax(dim=-1).gather(-1, self.tokens.T[..., None])[..., 0].T  # [rows, _NUM_TOKENS]
        return [list(zip(*row, strict=True)) for row in zip(self.tokens.tolist(), chosen.tolist(), strict=True)]

    def compare(self, name: str, others: list[Tokens]) -> None:
        """
        Raises:
            DifferentAnswer: ``others``, which are ``name``'s, aren't the same.
        """
        difference = self.difference(others)
        if difference is not None:
            raise DifferentAnswer(f"{name}: {difference}")

    def difference(self, others: list[Tokens]) -> str | None:
        """Where ``others`` differ first. After a tie they may."""
        assert self.logits is not None
        for row, (wants, gots) in enumerate(zip(self.rows(), others, strict=True)):
            if len(gots) != len(wants):
                return f"prompt {row} has {len(gots)} new tokens, not {len(wants)}"
            for at, ((want, logprob), (got, own)) in enumerate(zip(wants, gots, strict=True)):
                best, second = self.logits[at, row].topk(2).values.tolist()
                if best - second <= _TIE:
                    break
                where = f"prompt {row}, new token {at}"
                if got != want:
                    return f"{where} is {got}, not {want} (stock's margin: {best - second:.2g})"
                if own is not None and logprob is not None and not abs(own - logprob) <= _LOGPROB:
                    return f"{where} has the log-probability {own:.5g}, not {logprob:.5g}"
        return None


def check(model_type: str, at: Callable[[str], None]) -> Row:
    """Build a tiny ``model_type`` and try the tiers, the best one first; ``at`` is told of each step beforehand."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny tensors: a second thread only costs
    tier, reason = _check(model_type, at)
    return Row(model_type, class_name(model_type), tier, reason)


def _check(model_type: str, at: Callable[[str], None]) -> tuple[str, str]:
    at("building it")
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return NOT_BUILT, said(error)
    at("stock's generate")
    try:
        stock = _answer(model.generate, _prompts())
    except Exception as error:
        return NOT_BUILT, f"stock's own generate fails: {said(error)}"
    try:
        refusal, nature = _engines(model, stock, at)
        tier, reason = _generate(model, stock, refusal, at)
    except DifferentAnswer as difference:
        return WRONG, str(difference)
    except Exception as error:
        return WRONG, said(error)
    return (NATIVE, nature + reason) if tier == NATIVE else (tier, reason)


def _engines(model: Any, stock: Answer, at: Callable[[str], None]) -> tuple[str | None, str]:
    """Why the engine refuses the model, or None; what its attention is like.

    Raises:
        DifferentAnswer: the engine takes it, and answers otherwise than stock.
    """
    nature = ""
    for name, config in _ENGINES.items():
        at(name)
        try:
            engine = Engine(model, config)
        except UnsupportedModel as error:
            return said(error), ""
        rows = _paged(engine)
        if stock.difference(rows):  # stock's own answer may change with the padding, which the engine never sees
            _alone(model.generate).compare(name, rows)
        nature = _nature(engine.spec)
    return None, nature


def _generate(model: Any, stock: Answer, refusal: str | None, at: Callable[[str], None]) -> tuple[str, str]:
    """The tier of ``paged_generate``, and what is to be said of that.

    Raises:
        DifferentAnswer: it answers otherwise than stock.
    """
    at("paged_generate")
    generate = paged_generate(model)
    try:
        stock.compare("paged_generate", _answer(generate, _prompts(), logits=False).rows())
        report = batched = last_report()
        assert batched is not None
        if refusal is None:
            _alone(model.generate).compare("paged_generate, one prompt at a time", _alone(generate).rows())
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
    """Whether the model's K/V really go to a PagedCache that it is given."""
    cache = PagedCache(model.config.get_text_config(decoder=True))
    try:
        _answer(model.generate, _prompts(), **{cache_argument(type(model).prepare_inputs_for_generation): cache})
    except ValueError:  # it takes no cache
        return False
    return cache.num_blocks_used > 0


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 100, (n,), generator=generator).tolist() for n in _LENGTHS]


def _answer(generate: Any, prompts: list[list[int]], logits: bool = True, **more: Any) -> Answer:
    """All prompts in one greedy batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])  # [rows, longest]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": _NUM_TOKENS, **more}
    if not logits:
        return Answer(generate(ids, **options)[:, longest:])
    out = generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return Answer(out.sequences[:, longest:], torch.stack(out.logits).float())


def _alone(generate: Any) -> Answer:
    """One prompt at a time."""
    answers = [_answer(generate, [prompt]) for prompt in _prompts()]
    logits = [answer.logits for answer in answers if answer.logits is not None]
    return Answer(torch.cat([answer.tokens for answer in answers]), torch.cat(logits, dim=1))


def _paged(engine: Engine) -> list[Tokens]:
    """The same prompts through the engine, all at once."""
    params = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True, logprobs=0)
    rows: dict[str, Tokens] = {}
    for index, prompt in enumerate(_prompts()):
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
    """What the attention of its layers is like, in a few words."""
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


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UnsupportedModel) else f"{type(error).__name__}: {text}"

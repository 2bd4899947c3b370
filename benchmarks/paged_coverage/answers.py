"""The answers of a generate() to three prompts, and whether two generate()s give the same answers.

This file knows generate(). It knows nothing of tiers or tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from paged_coverage.tiny import WINDOW
from paged_hf.model.rounding import narrow_dtype, reading, tolerance

_LENGTHS = (5, 3 * WINDOW + 2, 14)  # of the prompts: mixed, one longer than any window
NUM_TOKENS = 12  # of each answer
_TIE = 1e-4  # if two logits of stock's are nearer than this, rounding decides
_TIMES = 4.0  # how many times stock's own rounding, at its worst logit, may decide between two logits
_LOGPROB = 1e-3  # that a token's log-probability may be off by

Tokens = list[tuple[int, float | None]]
"""The new tokens of a prompt, each with its log-probability where that is known."""


class DifferentAnswer(Exception):
    """Our answer isn't stock's; the message says which way of ours, and where they first differ."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generate()'s answers to some prompts."""

    tokens: Tensor  # i64 [rows, NUM_TOKENS]
    logits: Tensor | None = None  # f32 [NUM_TOKENS, rows, vocab]
    doubt: Tensor | None = None  # f32 [NUM_TOKENS, rows]: largest gap that rounding may decide

    def rows(self) -> list[Tokens]:
        if self.logits is None:
            return [[(token, None) for token in row] for row in self.tokens.tolist()]
        chosen = self.logits.log_softmax(dim=-1).gather(-1, self.tokens.T[..., None])[..., 0].T  # [rows, NUM_TOKENS]
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
        """Where ``others`` differ first. With 16-bit weights, one prompt of three may differ, because rounding may
        choose other experts for a token, and then all later tokens differ."""
        faults = [self._fault(row, *both) for row, both in enumerate(zip(self.rows(), others, strict=True))]
        found = [fault for fault in faults if fault is not None]
        return found[0] if len(found) > (0 if self.doubt is None else len(faults) // 3) else None

    def _fault(self, row: int, wants: Tokens, gots: Tokens) -> str | None:
        """What is wrong with one prompt. Tokens after a difference by rounding aren't compared."""
        assert self.logits is not None
        if len(gots) != len(wants):
            return f"prompt {row} has {len(gots)} new tokens, not {len(wants)}"
        for at, ((want, logprob), (got, own)) in enumerate(zip(wants, gots, strict=True)):
            doubt = 0.0 if self.doubt is None else float(self.doubt[at, row])
            where = f"prompt {row}, new token {at}"
            if got != want:
                apart = abs(float(self.logits[at, row, want] - self.logits[at, row, got]))
                if apart <= max(doubt, _TIE):
                    return None
                return f"{where} is {got}, not {want} (their logits are {apart:.2g} apart)"
            if own is not None and logprob is not None and not abs(own - logprob) <= max(doubt, _LOGPROB):
                return f"{where} has the log-probability {own:.5g}, not {logprob:.5g}"
        return None


def prompts() -> list[list[int]]:
    """The questions: token ids, of mixed lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 100, (n,), generator=generator).tolist() for n in _LENGTHS]


def answer(generate: Any, rows: list[list[int]], logits: bool = True, **more: Any) -> GeneratedAnswer:
    """All ``rows`` in one greedy batch, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])  # [rows, longest]
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NUM_TOKENS, **more}
    if not logits:
        return GeneratedAnswer(generate(ids, **options)[:, longest:])
    out = generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return GeneratedAnswer(out.sequences[:, longest:], torch.stack(out.logits).float())


def stocks_answer(model: Any, rows: list[list[int]]) -> GeneratedAnswer:
    """The model's own generate()'s answer. For 16-bit weights its logits are those of a float32 reading."""
    said = answer(model.generate, rows)
    narrow = narrow_dtype(model)
    if narrow is None:
        return said
    assert said.logits is not None
    exact = reading(lambda: answer(model.generate, rows, logits_processor=[_Led(said.tokens)]).logits)
    if exact is None:
        return GeneratedAnswer(said.tokens, said.logits, _TIMES * tolerance(narrow) * said.logits.std(-1))
    off = (said.logits - exact).abs().amax(-1)  # [NUM_TOKENS, rows]
    return GeneratedAnswer(said.tokens, exact, _TIMES * off.maximum(off.median(dim=0).values))


def alone(ask: Callable[[list[list[int]]], GeneratedAnswer]) -> GeneratedAnswer:
    """One prompt at a time."""
    answers = [ask([prompt]) for prompt in prompts()]

    def side_by_side(parts: list[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known, dim=1) if known else None

    return GeneratedAnswer(
        torch.cat([each.tokens for each in answers]),
        side_by_side([each.logits for each in answers]),
        side_by_side([each.doubt for each in answers]),
    )


class _Led(LogitsProcessor):  # type: ignore[misc]
    """Forces a generate() to given tokens, ``i64 [rows, NUM_TOKENS]``."""

    def __init__(self, tokens: Tensor) -> None:
        self._next = iter(tokens.T)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf")).scatter(1, next(self._next)[:, None], 0.0)

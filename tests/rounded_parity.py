"""The results of stock's generate() with 16-bit weights, and how far rounding may lead another correct result away from
them.

Stock's loop runs twice: unchanged, and with every operation in float32. Each time the scores by which the loop chooses
are recorded. Where the tokens before are the same, the difference of the two runs' scores is rounding. Another correct
answer may choose differently at a near-tie, where scores are closer than that. Nothing can be compared beyond such a
place.

This file knows generate() and its outputs. It knows nothing of models: the tests bring them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paged_hf.model.rounding import Widened

Options = dict[str, Any]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALE = 2.0  # each of two scores may be off by as much as stock's worst
_WIDEST = 1.5  # of the scores' standard deviations: with a larger margin nearly every token would pass
_aten = torch.ops.aten


@dataclass
class Choice:
    """One step of a loop: ``f32 [R,N]`` scores, of which the greatest of each row are chosen; ``i64 [R,K]`` their
    indices."""

    scores: Tensor
    chosen: Tensor


class Choices(TorchDispatchMode):
    """Records the steps of a loop by the operation that makes its choice."""

    def __init__(self, options: Options, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        beams, sampled = options.get("num_beams", 1) > 1, options.get("do_sample", False)
        assert not (beams and sampled), "which of a step's operations chooses can't be told"
        self.made: list[Choice] = []
        self._operation = (
            _aten.topk.default if beams else _aten.multinomial.default if sampled else _aten.argmax.default
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = torch.get_rng_state() if func is _aten.multinomial.default else None
        result = func(*args, **(kwargs or {}))
        if func is self._operation and self._is_of_tokens(args[0]):
            scores = args[0].float() if before is None else _as_drawn(args[0], before)
            chosen = result[1] if isinstance(result, tuple | list) else result
            self.made.append(Choice(scores.clone(), chosen.reshape(len(scores), -1).clone()))
        return result

    def _is_of_tokens(self, scores: Tensor) -> bool:
        """Return whether the scores are of tokens, not of experts or of a mask."""
        return scores.ndim == 2 and scores.is_floating_point() and scores.shape[1] >= self._vocab_size


def _as_drawn(probabilities: Tensor, random_state: Tensor) -> Tensor:
    """torch draws the token with the greatest probability over a random exponential number; return the logarithm of
    that quotient."""
    after = torch.get_rng_state()
    torch.set_rng_state(random_state)
    drawn = probabilities.log() - torch.empty_like(probabilities).exponential_(1).log()
    torch.set_rng_state(after)
    return drawn


@dataclass
class StockCall:
    """A call of stock's generate(): its full output, and the choices of its loop."""

    output: Any
    choices: list[Choice]
    random_state: Tensor

    @classmethod
    def of(
        cls, generate: Callable[..., Any], args: Sequence[Any], options: Options, seed: int, wide: bool
    ) -> StockCall:
        asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        choices = Choices(options, generate.__self__.config.vocab_size)
        torch.manual_seed(seed)
        with ExitStack() as stack:
            if wide:
                stack.enter_context(Widened())
            stack.enter_context(choices)
            output = generate(*args, **{**options, **asked})
        return cls(output, choices.made, torch.get_rng_state())


@dataclass
class Rounded:
    """Stock's answer to a call, by which others are judged. ``compared``: how many of their tokens had to be equal."""

    read: StockCall  # the run in float32
    width: int  # of the prompts
    vocab_size: int
    margin: float
    compared: int = 0
    allowed: dict[str, float] = field(default_factory=dict)  # by kind of output (logits, scores): how far it may be off

    @classmethod
    def of(
        cls,
        generate: Callable[..., Any],
        *args: Any,
        seed: int = 0,
        fresh: Callable[[], Options] = dict,
        **options: Any,
    ) -> Rounded:
        stocks, read = (StockCall.of(generate, args, {**options, **fresh()}, seed, wide) for wide in (False, True))
        ids = args[0] if args else options.get("input_ids", options.get("inputs"))
        found = cls(read, ids.shape[1], read.output.logits[0].shape[-1], _margin(stocks, read))
        for name in ("logits", "scores"):
            pairs = found._steps(getattr(stocks.output, name), name, stocks.output.sequences)
            found.allowed[name] = _SCALE * max((_largest(*pair) for pair in pairs), default=0.0)
        found.assert_sequences(stocks.output.sequences, "stock's own")
        found.compared = 0
        return found

    @property
    def has_beams(self) -> bool:
        return self.read.choices[0].scores.shape[1] > self.vocab_size

    def assert_output(self, got: Any, where: str) -> None:
        """Assert that a result of ``generate()`` is correct: token ids, or an output with logits and scores."""
        if isinstance(got, Tensor):
            self.assert_sequences(got, where)
            return
        self.assert_sequences(got.sequences, f"{where}.sequences")
        for name, allowed in self.allowed.items():
            for ours, theirs in self._steps(getattr(got, name, None) or (), name, got.sequences):
                assert _largest(ours, theirs) <= allowed, f"{where}.{name}: off by {_largest(ours, theirs)} > {allowed}"

    def assert_sequences(self, got: Tensor, where: str = "tokens") -> None:
        """Assert that ``got`` is correct: i64 [R,L], prompts included."""
        if self.has_beams:
            self._assert_beams(got, where)
            return
        want, width = self.read.output.sequences, min(got.shape[1], self.read.output.sequences.shape[1])
        assert len(got) == len(want), where
        assert torch.equal(got[:, : self.width], want[:, : self.width]), f"{where}: another prompt"
        firsts = [self._first_difference(row, theirs) for row, theirs in zip(got, want, strict=True)]
        for row, first in enumerate(firsts):
            if first < width:
                self._assert_near(row, first, int(got[row, first]), where)
        assert got.shape == want.shape or min(firsts) < width, f"{where}: another length"
        self.compared += sum(first - self.width for first in firsts)

    def _first_difference(self, row: Tensor, theirs: Tensor) -> int:
        width = min(len(row), len(theirs))
        differing = (row[:width] != theirs[:width]).nonzero()
        return int(differing[0]) if len(differing) else width

    def _assert_near(self, row: int, column: int, token: int, where: str) -> None:
        scores = self.read.choices[column - self.width].scores[row]
        behind = float(scores.max() - scores[token])
        assert behind <= self.margin, (
            f"{where}: row {row}, token {column - self.width}: {token} is {behind:.3f} behind the best, and rounding "
            f"explains {self.margin:.3f}"
        )

    def _assert_beams(self, got: Tensor, where: str) -> None:
        """Assert that beams are correct. A near-tie among the beams of a prompt may show much later, so a prompt's
        beams are compared completely or not at all."""
        want = self.read.output.sequences
        firm = self._firm_prompts()
        of_prompt = torch.arange(len(want)) // (len(want) // len(firm))
        for row in firm[of_prompt].nonzero()[:, 0].tolist():
            assert torch.equal(got[row], want[row]), f"{where}: beam {row}: {got[row]} instead of {want[row]}"
            self.compared += len(want[row]) - self.width

    def _firm_prompts(self) -> Tensor:
        """Return ``bool [B]``: in no step is the last beam closer than the margin to the best one left out, and at the
        end no beam is that close to the next."""
        num_beams = self.read.choices[0].scores.shape[1] // self.vocab_size
        best = [choice.scores.topk(num_beams + 1).values for choice in self.read.choices]
        apart = [scores[:, :-1] - scores[:, 1:] for scores in best]
        return torch.cat([step[:, -1:] for step in apart] + apart[-1:], 1).min(1).values > self.margin

    def _steps(self, ours: Sequence[Tensor], name: str, sequences: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of our and stock's numbers for each step, for rows whose tokens are the same until then."""
        pairs = []
        for step, (mine, theirs) in enumerate(zip(ours, getattr(self.read.output, name), strict=False)):
            if self.has_beams:
                return [(mine, theirs)]  # later steps' beams are in another order
            till = self.width + step
            same = (sequences[:, :till] == self.read.output.sequences[:, :till]).all(-1)
            pairs.append((mine[same], theirs[same]))
        return pairs


def assert_rows(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Any], **options: Any) -> int:
    """Assert that ``answers`` are correct: for each prompt the tokens after it, or as many rows of them as the options
    ask for. Returns how many tokens had to be equal."""
    compared = 0
    for prompt, found in zip(prompts, answers, strict=True):
        ids = torch.tensor([list(prompt)])
        settings = {"do_sample": False, "pad_token_id": 0, **options}
        rounded = Rounded.of(model.generate, ids, attention_mask=torch.ones_like(ids), **settings)
        new = torch.tensor(found).reshape(-1, settings["max_new_tokens"])
        rounded.assert_sequences(torch.cat([ids.expand(len(new), -1), new], 1))
        compared += rounded.compared
    return compared


def _margin(stocks: StockCall, read: StockCall) -> float:
    """Return how close two scores must be to be confused, by how much stock's own scores are off."""
    first = stocks.choices[0], read.choices[0]
    worst, same = _largest(*(choice.scores for choice in first)), torch.ones(len(first[0].chosen), dtype=torch.bool)
    if read.output.get("beam_indices") is not None:  # equals may swap places, so later steps can't be compared by beam
        worst *= len(read.choices) ** 0.5  # each step adds an error to a beam's score
    else:
        for mine, theirs in zip(stocks.choices, read.choices, strict=False):
            worst = max(worst, _largest(mine.scores[same], theirs.scores[same]))
            same = same & (mine.chosen == theirs.chosen).all(-1)
    spread = read.output.logits[0].std(-1).mean().item()
    assert _SCALE * worst < _WIDEST * spread, f"stock is off by {worst}, of {spread}: such a call proves nothing"
    return _SCALE * worst


def _largest(got: Tensor, want: Tensor) -> float:
    told = got.isfinite() & want.isfinite()
    return float((got - want)[told].abs().max()) if told.any() else 0.0

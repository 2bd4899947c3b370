"""The open rows of an episode, and the judge of how they end."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from fuzz.alone import Alone, Answer, Collected
from fuzz.asks import Ask
from fuzz.model import Kind
from paged_core import FinishReason
from paged_core.scheduling.request import Group, Request

MOMENT, NAN = "for a moment", "logits hold NaN"  # texts in the errors of faults that pass
_MODEL_FAILED = "the model failed on this request"


@dataclass
class Row:
    request: Request
    ask: Ask | None  # None: it has a selector of the caller's own
    weights: int
    collected: Collected = field(default_factory=Collected)
    cancelled: bool = False
    stopped: bool = False
    rude: bool = False  # whether its selector returns invalid results

    @property
    def max_tokens(self) -> int:
        """The most tokens that it could get so far."""
        return self.request.max_total - self.request.num_prompt


class Judge:
    """Knows what each row should get, and how many groups may end because of a passing fault."""

    def __init__(self, alone: Alone, kind: Kind) -> None:
        self.excuses: Counter[str] = Counter()  # by fault: how many groups may still end because of it
        self.nan_seen = False
        self._alone = alone
        self._kind = kind
        self._excused: set[Group] = set()

    def end(self, row: Row, output) -> None:
        """Assert that the row got exactly what it gets alone."""
        if row.ask is None:
            self._end_of_group(row, output)
            return
        answers = self._alone.answers(self._kind, row.weights, row.ask, row.max_tokens)
        truth, told = answers[row.request.index], row.collected.answer(output, False)
        reason = output.finish_reason
        cut = (row.cancelled and reason is FinishReason.ABORT) or (row.stopped and reason is FinishReason.STOP)
        cut = cut or self._is_excused(row, output, told, truth)
        if not cut and row.ask.n > 1 and not row.ask.beams:
            cut = any(_MODEL_FAILED in (answer.error or "") for answer in answers)  # then its samples end with it
        if row.ask.beams:
            if not cut:
                _compare(row, row.collected.answer(output, True), truth)
            return
        if cut:
            truth = truth._replace(
                token_ids=truth.token_ids[: len(told.token_ids)],
                logprobs=truth.logprobs[: len(told.logprobs)],
                finish_reason=told.finish_reason,
                error=told.error,
            )
            told = told._replace(token_ids=told.token_ids[: len(truth.token_ids)])
        _compare(row, told, truth)
        self._compare_prompt_logprobs(row, told, answers)

    def _end_of_group(self, row: Row, output) -> None:
        reason = output.finish_reason
        if (row.cancelled and reason is FinishReason.ABORT) or (row.stopped and reason is FinishReason.STOP):
            return
        if row.rude and reason is FinishReason.ERROR:
            return
        next_token = self._alone.model(self._kind, row.weights).next_token
        at_fault = any(next_token(member.tokens) is None for member in row.request.group.members)
        assert reason is FinishReason.ERROR, f"{row.request} ended unasked"
        assert at_fault or self._is_excused(row, output, None, None), f"{row.request}: {output.error}"

    def _is_excused(self, row: Row, output, told: Answer | None, truth: Answer | None) -> bool:
        if output.finish_reason is not FinishReason.ERROR:
            return False
        if told and truth and told.error == truth.error and len(told.token_ids) == len(truth.token_ids):
            return False  # the request's own fault
        if row.request.group in self._excused:
            return True
        for what in (MOMENT, NAN):
            if what in output.error and self.excuses[what]:
                self.excuses[what] -= 1
                self._excused.add(row.request.group)
                return True
        return False

    def _compare_prompt_logprobs(self, row: Row, told: Answer, answers: list[Answer]) -> None:
        found = told.prompt_logprobs
        if found is None or self.nan_seen:  # only one of n samples has them
            return
        truth = next(answer.prompt_logprobs for answer in answers if answer.prompt_logprobs is not None)
        assert _alike(found, truth), f"{row.request}: prompt_logprobs {found} instead of {truth}"


def _compare(row: Row, told: Answer, truth: Answer) -> None:
    for name in ("token_ids", "finish_reason", "error"):
        one, other = getattr(told, name), getattr(truth, name)
        assert one == other, f"{row.request}, {row.ask}: {name} is {one}, alone it is {other}; told {told}"
    assert _alike(told.logprobs, truth.logprobs), f"{row.request}: {told.logprobs} instead of {truth.logprobs}"


def _alike(found, truth) -> bool:
    """Return whether two lists of Logprobs are equal up to rounding."""
    return len(found) == len(truth) and all(
        (one or {}).keys() == (other or {}).keys()
        and all(_near(one[id].logprob, other[id].logprob) for id in one or {})
        for one, other in zip(found, truth, strict=True)
    )


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(one) and math.isnan(other))

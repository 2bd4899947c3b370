"""BeamSearch: the TokenSelector of one lockstep group, whose rows are the beams. This file knows nothing of text.

The rules are vLLM's. A sequence scores ``sum of its log-probabilities / length ** length_penalty``. The length counts
the prompt, but not the stop token. Beams that a stop token ends are set aside, and the most likely others take their
rows. The search ends when no running beam can still become one of the best, or at the length limit, where running beams
count too. With ``early_stopping`` it ends as soon as as many sequences have ended as there are rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paged_core.execution.model import TokenSelector
from paged_core.sampling.draw import top_rows
from paged_core.scheduling.request import FinishReason, Request, RequestOutput, Selection


class Beam(NamedTuple):
    """A sequence that has ended."""

    token_ids: list[int]  # output tokens, the stop token included
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


class BeamSearch(TokenSelector):
    """One search, whose width is the number of rows. ``best``: the sequences that have ended, best first.

    ``select`` may be called again for a step whose Selection was not used.
    """

    def __init__(self) -> None:
        self.best: list[Beam] = []
        self._sums: list[float] = []  # of each running beam's log-probabilities, in falling order
        # the length at the latest step; ``best`` and ``_sums`` before that step
        self._before = (0, self.best, self._sums)

    @torch.inference_mode()
    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        """Choose from ``logits [W,V]``: all rows of the group, in order."""
        self._begin_step(len(requests[0].tokens))
        width, stops = len(requests), torch.tensor(sorted(requests[0].stop_token_ids), dtype=torch.int64)
        num = min((1 + max(1, len(stops))) * width, logits.shape[1])  # enough, even if every stop token is among them
        logprobs, ids = (part.cpu() for part in top_rows(logits.float().log_softmax(-1), num))  # [W,C]
        if logprobs.isnan().any():
            return _failed(width, f"the model's logits {_what_is_wrong(logits)}")
        # at first all rows are the prompt, and only one counts
        sums = self._sums or [0.0] + [float("-inf")] * (width - 1)
        totals = logprobs.double() + torch.tensor(sums, dtype=torch.float64)[:, None]  # [W,C]
        stopping = torch.isin(ids, stops)
        self._set_aside(requests, ids, totals, stopping)

        running, order = totals.masked_fill(stopping, float("-inf")).flatten().sort(descending=True, stable=True)
        self._sums, order = running[:width].tolist(), order[:width]
        num_running = int(running[:width].isfinite().sum())
        # rows that no beam needs repeat the first one, and their sums never count
        order[num_running:] = order[0].clone()
        token_ids, parents = ids.flatten()[order].tolist(), (order // num).tolist()
        over = self._over(requests, token_ids[:num_running], parents)
        if num_running < width and len(self.best) < width:
            return _failed(width, f"the model allows fewer than {width} continuations; ask for a smaller n")
        finished = {i: self.best[i].finish_reason for i in range(width)} if over else None
        return Selection(token_ids, parents=parents, finished=finished)

    def _begin_step(self, length: int) -> None:
        before, best, sums = self._before
        if length == before:
            self.best, self._sums = best, sums
        self._before = (length, self.best, self._sums)

    def _set_aside(self, requests: Sequence[Request], ids: Tensor, totals: Tensor, stopping: Tensor) -> None:
        ended = []
        for row, place in (stopping & totals.isfinite()).nonzero().tolist():
            request = requests[row]
            tokens = [*request.output_token_ids, int(ids[row, place])]
            ended.append(_beam(tokens, float(totals[row, place]), len(request.tokens), request, FinishReason.STOP))
        self._keep(ended, len(requests))

    def _over(self, requests: Sequence[Request], token_ids: Sequence[int], parents: Sequence[int]) -> bool:
        first, width = requests[0], len(requests)
        length = len(first.tokens) + 1  # of running beams, with this step's token
        if length >= first.max_total:
            running = zip(token_ids, parents, self._sums, strict=False)  # without rows that no beam needs
            self._keep(
                [
                    _beam([*requests[parent].output_token_ids, token], total, length, first, FinishReason.LENGTH)
                    for token, parent, total in running
                ],
                width,
            )
            return True
        if len(self.best) < width:
            return False
        penalty = first.params.length_penalty
        attainable = self._sums[0] / (first.max_total if penalty > 0 else length) ** penalty
        return first.params.early_stopping or attainable <= self.best[-1].score

    def _keep(self, ended: list[Beam], width: int) -> None:
        self.best = sorted(self.best + ended, key=lambda beam: -beam.score)[:width]


def ranked(output: RequestOutput) -> tuple[RequestOutput, float]:
    """Return the end of row i of a search as the end of the i-th best sequence, with the sum of its
    log-probabilities."""
    if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        return output, 0.0
    search = output.request.selector
    assert isinstance(search, BeamSearch)
    beam = search.best[output.request.index]
    return output._replace(token_ids=beam.token_ids), beam.cumulative_logprob


def _beam(tokens: list[int], total: float, length: int, request: Request, reason: FinishReason) -> Beam:
    return Beam(tokens, total, total / length**request.params.length_penalty, reason)


def _failed(width: int, message: str) -> Selection:
    return Selection([None] * width, errors=dict.fromkeys(range(width), message))


def _what_is_wrong(logits: Tensor) -> str:
    if logits.isnan().any():
        return "hold NaN"
    return "hold +inf" if logits.isposinf().any() else "are -inf for every token"

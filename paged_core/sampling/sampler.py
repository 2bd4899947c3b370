"""The core's own TokenSelector: one vectorised pass over rows with different parameters.

It knows logits and SamplingParams. It knows nothing of text, stop strings, blocks or scheduling. For each row it does
this, in vLLM's order:

1. logprobs are taken from the raw logits
2. allowed_token_ids, then bad_words_token_ids, min_tokens (no stop token yet) and logit_bias
3. repetition_penalty over prompt and output, then frequency_penalty and presence_penalty over output tokens
4. the request's own logits processors
5. greedy rows take the largest score here, the lowest id among equals; the others go on
6. temperature, min_p, top_k, top_p, then one draw

A row depends only on its own logits, history, parameters and (seed, index, position): it gets the same token alone and
in any batch. A row that fails is reported in ``Selection.errors``, and touches no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from paged_core.execution.model import RequestSampler, TokenSelector
from paged_core.execution.staging import Download, take_rows, upload
from paged_core.sampling.draw import ArgmaxRows, TopRows, argmax_rows, draw_rows, draw_waits, top_rows
from paged_core.sampling.logits import RowEdits, edit_rows
from paged_core.sampling.logprobs import top_logprobs
from paged_core.scheduling.request import Logprob, Request, Selection


class Sampler(RequestSampler):
    """Chooses the next token of every row. Its state belongs to requests, never to positions in a batch.

    ``argmax`` maps ``logits [S,V] of any float dtype -> (id i64 [S], largest float [S])``: the lowest id of equals, and
    NaN counts as the largest. ``top`` maps ``scores float32 [S,V], k -> (values [S,k], ids i64 [S,k])``, by value
    descending, then id ascending.
    """

    def __init__(self, argmax: ArgmaxRows = argmax_rows, top: TopRows = top_rows) -> None:
        self._argmax = argmax
        self._top = top
        self._edits: WeakKeyDictionary[Request, RowEdits] = WeakKeyDictionary()
        self._processed: WeakKeyDictionary[Request, Tensor | str] = WeakKeyDictionary()  # see edit_rows

    @torch.inference_mode()
    def choose(self, logits: Tensor, requests: Sequence[Request], num_unknown: int = 0) -> TokensOnDevice | None:
        """Choose from ``logits [S,V]`` without changing them. Returns None if some row has edits or logprobs, or if its
        draw would wait."""
        for request in requests:
            if request.params.logprobs is not None or draw_waits(request, logits.shape[1]):
                return None
            errors: dict[int, str] = {}
            if self._edits_of(request, 0, logits.shape[1], errors) is not None or errors:
                return None
        drawn = [row for row, request in enumerate(requests) if not request.params.greedy]
        scores = logits.detach().to(torch.float32, copy=True) if drawn else logits.detach()
        return TokensOnDevice(*self._tokens(scores, requests, drawn, num_unknown), range(len(requests)))

    @torch.inference_mode()
    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        """Choose from ``logits [S,V]``, row i for ``requests[i]``. float32 logits may be overwritten.

        Raises:
            torch.OutOfMemoryError: may be called again for the same step, and then calls no processor twice.
        """
        logits = logits.detach()
        errors: dict[int, str] = {}
        edits = [self._edits_of(request, row, logits.shape[1], errors) for row, request in enumerate(requests)]
        work = [(row, requests[row], edit) for row, edit in enumerate(edits) if edit is not None]
        drawn = [row for row, request in enumerate(requests) if not request.params.greedy]
        asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]

        raw = torch.log_softmax(take_rows(logits, asked).float(), -1) if asked else None  # [len(asked),V]
        scores = logits.float() if work or drawn else logits
        if work:
            errors.update(edit_rows(scores, [item for item in work if item[0] not in errors], self._processed))

        found, peaks = self._tokens(scores, requests, [row for row in drawn if row not in errors])[1].wait()
        token_ids = [int(token) for token in found]
        for row, peak in enumerate(peaks):
            if not math.isfinite(peak):
                errors.setdefault(row, _what_is_wrong(peak, edits[row] is not None))
        logprobs = None
        if raw is not None:
            logprobs = _logprobs_of(raw, asked, token_ids, requests, errors)
        for _, request, _ in work:
            self._processed.pop(request, None)
        return Selection(token_ids, logprobs, errors or None)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, next_ids: Sequence[int], num: int) -> list[dict[int, Logprob]]:
        """Return for ``logits [N,V]`` at N prompt positions the Logprob of the next token, then of the ``num`` most
        likely."""
        logprobs = torch.log_softmax(logits.detach().float(), -1)
        return top_logprobs(logprobs, next_ids, [num] * len(next_ids))

    def _tokens(
        self, scores: Tensor, requests: Sequence[Request], drawn: Sequence[int], num_unknown: int = 0
    ) -> tuple[Tensor, Download]:
        """Return the token of each row of ``scores [S,V]``, i64 [S], and a download of these with the rows' largest
        scores. ``drawn``: rows that aren't greedy; their scores are float32 and may be overwritten."""
        token_ids, largest = self._argmax(scores)
        if drawn:
            theirs = [requests[row] for row in drawn]
            rows, tokens = draw_rows(scores, largest, drawn, theirs, self._top, num_unknown)
            token_ids = token_ids.index_copy(0, upload(torch.tensor(rows), scores.device), tokens)
        return token_ids, _download(token_ids, largest)

    @property
    def num_edited(self) -> int:
        """Requests whose parameters it has compiled, and which are still there."""
        return len(self._edits)

    def _edits_of(self, request: Request, row: int, vocab_size: int, errors: dict[int, str]) -> RowEdits | None:
        """Return the changes of this request's scores, compiled at its first step, or None if it has none."""
        edits = self._edits.get(request)
        if edits is None:
            try:
                edits = RowEdits(request, vocab_size)
            except Exception as error:
                errors[row] = f"sampling parameters can't be used: {error}"
                return None
            self._edits[request] = edits
        return edits if edits.any else None


class Greedy(TokenSelector):
    """Takes the most likely token of each row, and ignores all parameters."""

    def choose(self, logits: Tensor, requests: Sequence[Request], num_unknown: int = 0) -> TokensOnDevice:
        token_ids = logits.argmax(dim=-1)
        return TokensOnDevice(token_ids, _download(token_ids, torch.zeros_like(token_ids)), range(len(requests)))

    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        return self.choose(logits, requests).fetch()


Likeliest = Greedy  # the name of Greedy before 0.2


class TokensOnDevice:
    """The tokens of plain rows: ``token_ids i64 [S]`` on the device. ``under_way`` is the download, which may have more
    rows: ``rows`` are the places of these tokens in it."""

    def __init__(self, token_ids: Tensor, under_way: Download, rows: Sequence[int]) -> None:
        self.token_ids = token_ids
        self._under_way = under_way
        self._rows = rows

    def keep(self, rows: Sequence[int]) -> TokensOnDevice:
        return TokensOnDevice(take_rows(self.token_ids, rows), self._under_way, [self._rows[row] for row in rows])

    def fetch(self) -> Selection:
        token_ids, peaks = self._under_way.wait()
        errors = {
            row: _what_is_wrong(peaks[place], False)
            for row, place in enumerate(self._rows)
            if not math.isfinite(peaks[place])
        }
        return Selection([int(token_ids[place]) for place in self._rows], None, errors or None)


def _download(token_ids: Tensor, largest: Tensor) -> Download:
    """Download both at once, because waiting for the device is what takes time."""
    return Download(torch.stack((token_ids.double(), largest.double())))


def _logprobs_of(
    raw: Tensor, asked: list[int], token_ids: list[int], requests: Sequence[Request], errors: dict[int, str]
) -> list[dict[int, Logprob] | None]:
    answer: list[dict[int, Logprob] | None] = [None] * len(requests)
    nums = [requests[row].params.logprobs or 0 for row in asked]
    found = top_logprobs(raw, [token_ids[row] for row in asked], nums)
    for row, logprobs in zip(asked, found, strict=True):
        if row not in errors:
            answer[row] = logprobs
    return answer


def _what_is_wrong(peak: float, edited: bool) -> str:
    if math.isnan(peak):
        return "the model's logits hold NaN"
    if peak > 0:
        return "the model's logits hold +inf"
    if edited:
        return "no token is left to choose: the request's constraints together forbid the whole vocabulary"
    return "the model's logits are -inf for every token"

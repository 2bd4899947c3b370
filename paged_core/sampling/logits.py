"""Changes of a request's logits before a token is chosen: masks, bias, penalties, and its own processors.

This file compiles one request's parameters and history into index tensors (RowEdits), and applies the edits of many
rows at once by scattering at (row, token). The cost grows with the tokens named, not with the vocabulary. This file
knows nothing of temperature or drawing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paged_core.execution.staging import upload
from paged_core.interrupts import interrupts_the_process
from paged_core.scheduling.params import InvalidRequestError
from paged_core.scheduling.request import Request

Work = Sequence[tuple[int, Request, "RowEdits"]]  # (row of scores, its request, its edits)
Processed = MutableMapping[Request, Tensor | str]  # results of processors in this step: scores [1,V], or an error
_NINF = float("-inf")
_TAIL = 8  # last tokens remembered, to notice that a history was replaced by another


class RowEdits:
    """One request's parameters as index tensors, and its token counts.

    Raises:
        ValueError: a token id that the caller named is outside the vocabulary.
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self.allowed = _ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
        bias = params.logit_bias or {}
        self.bias_ids = _ids("logit_bias", bias or None, vocab_size)
        self.bias = torch.tensor([float(value) for value in bias.values()], dtype=torch.float32)
        # Tokenizers know stop tokens that a model does not. Ids past the vocabulary can't be chosen anyway.
        self.stops = [id for id in sorted(request.stop_token_ids) if 0 <= id < vocab_size]
        self.bad_words = _by_last_but_one(params.bad_words_token_ids, vocab_size)
        self.repetition = float(params.repetition_penalty)
        self.presence = float(params.presence_penalty)
        self.frequency = float(params.frequency_penalty)
        self.processors = tuple(params.logits_processors)
        self.counts: TokenCounts | None = None
        if self.repetition != 1 or self.presence or self.frequency:
            self.counts = TokenCounts(with_prompt=self.repetition != 1)
        self.any = bool(
            self.allowed is not None
            or self.bias_ids is not None
            or (params.min_tokens and self.stops)
            or self.bad_words
            or self.counts is not None
            or self.processors
        )

    def forbidden(self, request: Request) -> list[int]:
        """Return the ids that may not come next: stop tokens before min_tokens, and the last tokens of bad words begun.

        A bad word may begin in the prompt, because the caller reads prompt and output together.
        """
        ids: list[int] = []
        if request.num_output < request.params.min_tokens:
            ids += self.stops
        if self.bad_words:
            tokens = request.tokens
            for start in {-1, tokens[-1] if tokens else -1}:
                for before, last in self.bad_words.get(start, ()):
                    if not before or tokens[-len(before) :] == before:
                        ids.append(last)
        return ids


class TokenCounts:
    """The distinct tokens of a history and how often the output has each, in tensors that grow with it."""

    def __init__(self, with_prompt: bool) -> None:
        self._with_prompt = with_prompt
        self._seen: list[int] | None = None  # the same list object; if the request has another one, all is counted anew
        self._num_seen = 0
        self._tail: list[int] = []  # its last few tokens

    def update(self, request: Request) -> tuple[Tensor, Tensor]:
        """Count the request's new tokens. Returns ``ids int64 [N]`` and how often the output has each, ``float32 [N]``.

        A history that doesn't continue the one counted (another beam's) is counted anew.
        """
        tokens, seen = request.tokens, self._num_seen
        if tokens is not self._seen or tokens[max(0, seen - len(self._tail)) : seen] != self._tail:
            self._count_anew(request)
        else:
            for token in tokens[seen:]:
                self._add(token)
        self._seen = tokens
        self._num_seen = len(tokens)
        self._tail = tokens[-_TAIL:]
        size = len(self._slots)
        return self._ids[:size], self._counts[:size]

    def _count_anew(self, request: Request) -> None:
        prompt = request.tokens[: request.num_prompt] if self._with_prompt else []
        counts = dict.fromkeys(prompt, 0) | Counter(request.output_token_ids)
        self._slots = {token: slot for slot, token in enumerate(counts)}  # token -> its place in the tensors
        self._ids = torch.tensor(list(counts), dtype=torch.int64)
        self._counts = torch.tensor(list(counts.values()), dtype=torch.float32)
        self._reserve(2 * len(counts) + 64)

    def _add(self, token: int) -> None:
        """Count one more output token."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == len(self._ids):
                self._reserve(2 * slot)
            self._ids_view[slot] = token
        self._counts_view[slot] += 1

    def _reserve(self, capacity: int) -> None:
        extra = capacity - len(self._ids)
        self._ids = torch.cat([self._ids, torch.zeros(extra, dtype=torch.int64)])
        self._counts = torch.cat([self._counts, torch.zeros(extra)])
        # A numpy view of the same memory: writing one element through torch takes ten times as long.
        self._ids_view: Any = self._ids.numpy()
        self._counts_view: Any = self._counts.numpy()


def edit_rows(scores: Tensor, work: Work, processed: Processed) -> dict[int, str]:
    """Change ``scores float32 [S,V]`` in place as the requests ask. Returns row -> what went wrong in that row's
    processors.

    Results of processors are stored in ``processed``. Processors of a request that is in it already aren't called
    again.
    """
    _keep_allowed(scores, work)
    _forbid(scores, work)
    _add_bias(scores, work)
    _penalise(scores, work)
    return _run_processors(scores, work, processed)


def _keep_allowed(scores: Tensor, work: Work) -> None:
    pairs = [(row, edits.allowed) for row, _, edits in work if edits.allowed is not None]
    if pairs:
        at = _at(pairs, scores.device)
        kept = scores[at]
        scores[upload(torch.tensor([row for row, _ in pairs]), scores.device)] = _NINF
        scores[at] = kept


def _forbid(scores: Tensor, work: Work) -> None:
    rows: list[int] = []
    ids: list[int] = []
    for row, request, edits in work:
        forbidden = edits.forbidden(request)
        rows += [row] * len(forbidden)
        ids += forbidden
    if ids:
        at = upload(torch.tensor([rows, ids]), scores.device)
        scores[at[0], at[1]] = _NINF


def _add_bias(scores: Tensor, work: Work) -> None:
    biased = [(row, edits) for row, _, edits in work if edits.bias_ids is not None]
    if biased:
        at = _at([(row, edits.bias_ids) for row, edits in biased if edits.bias_ids is not None], scores.device)
        scores[at] += upload(torch.cat([edits.bias for _, edits in biased]), scores.device)


def _penalise(scores: Tensor, work: Work) -> None:
    """Apply penalties: repetition scales scores towards less likely, whatever their sign; frequency and presence
    subtract."""
    found = [(row, edits, edits.counts.update(request)) for row, request, edits in work if edits.counts is not None]
    if not found:
        return
    device = scores.device
    at = _at([(row, ids) for row, _, (ids, _) in found], device)
    counts = upload(torch.cat([counts for _, _, (_, counts) in found]), device)
    lengths = torch.tensor([len(ids) for _, _, (ids, _) in found])
    factors = torch.tensor([(edits.repetition, edits.frequency, edits.presence) for _, edits, _ in found])
    repetition, frequency, presence = upload(factors.repeat_interleave(lengths, dim=0), device).unbind(1)
    values = scores[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    scores[at] = values - frequency * counts - presence * (counts > 0)


def _run_processors(scores: Tensor, work: Work, processed: Processed) -> dict[int, str]:
    errors = {}
    for row, request, edits in work:
        if edits.processors:
            if request not in processed:
                processed[request] = _answer(scores[row : row + 1], request, edits.processors)
            answer = processed[request]
            if isinstance(answer, str):
                errors[row] = answer
            else:
                scores[row] = answer
    return errors


def _answer(scores: Tensor, request: Request, processors: Sequence[Any]) -> Tensor | str:
    """Return the scores that a request's processors make of its ``scores [1,V]``, or what went wrong in them.

    Raises:
        torch.OutOfMemoryError: raised outside the processors.
    """
    try:
        return _processed(scores, request, processors)
    except BaseException as error:  # the caller's code may raise anything, which ends its own request only
        if interrupts_the_process(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        told = isinstance(error, (_BadScores, InvalidRequestError))
        return str(error) if told else f"{type(error).__name__}: {error}"


class _BadScores(Exception):
    """A processor returned something that can't be sampled from."""


def _processed(scores: Tensor, request: Request, processors: Sequence[Any]) -> Tensor:
    # This runs outside inference mode, as in stock generate, so that tensors which processors keep are usable later.
    # Processors get a clone, because they may change it in place and keep it.
    if scores.isnan().any():
        raise _BadScores("the model's logits hold NaN")
    with torch.inference_mode(False), torch.no_grad():
        input_ids = torch.tensor([request.tokens], dtype=torch.int64, device=scores.device)  # [1,L]
        current = scores.clone()  # [1,V]
        for processor in processors:
            name = getattr(processor, "__name__", type(processor).__name__)
            try:
                current = processor(input_ids, current)
            except InvalidRequestError:  # the error says itself what is wrong with the request
                raise
            except BaseException as error:
                if interrupts_the_process(error):
                    raise
                raise _BadScores(f"logits processor {name} raised {type(error).__name__}: {error}") from error
            _check(name, current, scores.shape)
        return current.to(scores)


def _check(name: str, scores: Any, shape: torch.Size) -> None:
    if not isinstance(scores, Tensor):
        raise _BadScores(f"logits processor {name} returned {type(scores).__name__}, not a tensor")
    if scores.shape != shape:
        raise _BadScores(f"logits processor {name} returned shape {list(scores.shape)}, not {list(shape)}")
    if not scores.is_floating_point():
        raise _BadScores(f"logits processor {name} returned {scores.dtype}, not floating-point scores")
    peak = float(scores.max())
    if peak != peak:
        raise _BadScores(f"logits processor {name} left NaN in the scores")
    if peak == float("inf"):
        raise _BadScores(f"logits processor {name} left +inf in the scores")
    if peak == _NINF:
        raise _BadScores(f"after logits processor {name} every token is forbidden (all scores are -inf)")


def _at(pairs: Sequence[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Turn pairs of (row, its ids) into the (row, id) index of every element, int64 [N] each."""
    lengths = torch.tensor([len(ids) for _, ids in pairs])
    rows = torch.tensor([row for row, _ in pairs]).repeat_interleave(lengths)
    at = upload(torch.stack((rows, torch.cat([ids for _, ids in pairs]))), device)
    return at[0], at[1]


def _ids(name: str, ids: Iterable[int] | None, vocab_size: int) -> Tensor | None:
    if ids is None:
        return None
    listed = [int(id) for id in ids]
    for id in listed:
        if not 0 <= id < vocab_size:
            raise ValueError(f"{name} names token {id}; the vocabulary has ids 0 to {vocab_size - 1}")
    return torch.tensor(listed, dtype=torch.int64)


def _by_last_but_one(words: Sequence[Sequence[int]], vocab_size: int) -> dict[int, list[tuple[list[int], int]]]:
    """Group bad words by the token before their last one; -1 for words of one token."""
    table: dict[int, list[tuple[list[int], int]]] = {}
    for word in words:
        if not word:
            raise ValueError("bad_words_token_ids holds an empty sequence")
        *before, last = (int(id) for id in word)
        if 0 <= last < vocab_size:
            table.setdefault(before[-1] if before else -1, []).append((before, last))
    return table

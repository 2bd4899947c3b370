"""Hands the sampled rows of a step to the selectors they belong to. A selector that raises ends its own rows only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paged_core.execution.batch import PromptRows
from paged_core.execution.model import Chosen, ForesightedSelector, TokenSelector
from paged_core.scheduling.request import FinishReason, Request, Selection

_log = logging.getLogger("paged_core")


class PromptLogprobs(NamedTuple):
    """What was asked about some positions of a prompt."""

    request: Request
    start: int  # position of the first token told of
    logprobs: list[Any]


def choose_rows(logits: Tensor, requests: Sequence[Request], sampler: TokenSelector, num_unknown: int) -> Chosen | None:
    """As ``select_rows``, but nobody waits, and ``logits [S, vocab]`` stay as they are. None: the host is needed.

    ``num_unknown``: tokens that each request has beside those the host knows.

    Raises:
        torch.AcceleratorError: the device has failed.
    """
    selectors = {id(request.selector or sampler) for request in requests}
    if len(selectors) != 1:
        return None
    selector = requests[0].selector or sampler
    if not isinstance(selector, ForesightedSelector) or not _chooses_as_it_selects(type(selector)):
        return None
    try:
        return selector.choose(logits, requests, num_unknown)
    except torch.AcceleratorError:
        raise
    except Exception:  # then they are chosen in their turn, where failing selectors are looked after
        _log.debug("tokens could not be chosen ahead", exc_info=True)
        return None


def select_rows(logits: Tensor, requests: Sequence[Request], sampler: TokenSelector) -> Selection:
    """Each selector gets its own rows; a selector that raises ends its own rows only.

    Raises:
        torch.OutOfMemoryError: ``sampler`` has no room for its rows. Some logits may be overwritten by then.
        torch.AcceleratorError: the device has failed.
    """
    if requests and all(request.selector is requests[0].selector for request in requests):
        return _select(requests[0].selector or sampler, logits, requests)
    rows_of: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        rows_of.setdefault(id(request.selector or sampler), []).append(row)
    token_ids: list[int | None] = [0] * len(requests)
    logprobs: list[Any] = [None] * len(requests)
    parents = list(range(len(requests)))
    errors: dict[int, str] = {}
    finished: dict[int, FinishReason] = {}
    for rows in rows_of.values():
        selector = requests[rows[0]].selector or sampler
        part = _select(selector, logits[rows], [requests[row] for row in rows])
        for i, row in enumerate(rows):
            token_ids[row] = part.token_ids[i]
            logprobs[row] = part.logprobs[i] if part.logprobs is not None else None
            parents[row] = rows[part.parents[i]] if part.parents is not None else row
        errors.update((rows[i], message) for i, message in (part.errors or {}).items())
        finished.update((rows[i], reason) for i, reason in (part.finished or {}).items())
    return Selection(token_ids, logprobs, errors, parents, finished)


def prompt_logprobs_of(
    logits: Tensor, prompt_rows: Sequence[PromptRows], sampler: TokenSelector
) -> list[PromptLogprobs]:
    """``logits [P, vocab]`` of prompt positions -> Logprobs of the tokens that follow them there."""
    told, row = [], 0
    for request, start, num in prompt_rows:
        next_ids = request.tokens[start + 1 : start + 1 + num]
        found = sampler.prompt_logprobs(logits[row : row + num], next_ids, request.params.prompt_logprobs or 0)
        told.append(PromptLogprobs(request, start + 1, list(found)))
        row += num
    return told


class OneByOne:
    """A selector's choice with the memory of a single row. For selectors whose rows don't depend on each other."""

    def __init__(self, selector: TokenSelector) -> None:
        self._selector = selector

    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        parts = [self._selector.select(logits[row : row + 1], [request]) for row, request in enumerate(requests)]
        return Selection(
            [part.token_ids[0] for part in parts],
            [part.logprobs[0] if part.logprobs else None for part in parts],
            {row: part.errors[0] for row, part in enumerate(parts) if part.errors},
        )

    def prompt_logprobs(self, logits: Tensor, next_ids: Sequence[int], num: int) -> Iterable[dict[int, Any]]:
        for row, next_id in enumerate(next_ids):
            yield from self._selector.prompt_logprobs(logits[row : row + 1], [next_id], num)


def _select(selector: TokenSelector, logits: Tensor, requests: Sequence[Request]) -> Selection:
    try:
        return selector.select(logits, requests)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        of_the_core = requests[0].selector is None and not isinstance(selector, OneByOne)
        if of_the_core and isinstance(error, torch.OutOfMemoryError):
            raise
        message = f"choosing the next token failed: {error!r}"
        return Selection([0] * len(requests), errors=dict.fromkeys(range(len(requests)), message))


def _chooses_as_it_selects(kind: type) -> bool:
    """Whether ``choose`` was written by whoever wrote ``select`` last, or after: else it chooses something else."""
    for base in kind.__mro__:
        if "choose" in vars(base):
            return True
        if "select" in vars(base):
            return False
    return False

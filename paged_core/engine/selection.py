"""Passes the sampled rows of a step to their selectors. A selector that raises, or returns something invalid, ends its
own rows only.

A selector may keep state, so it is called once a step. Only the engine's sampler may be called again, if memory has no
room for all of its rows. It is called before all other selectors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paged_core.engine.answers import FAILED, checked
from paged_core.execution.batch import PromptRows
from paged_core.execution.model import Chosen, RequestSampler, TokenSelector
from paged_core.interrupts import interrupts_the_process
from paged_core.scheduling.request import FinishReason, Group, Request, Selection

_log = logging.getLogger("paged_core")


class PromptLogprobs(NamedTuple):
    """Logprobs of some positions of a prompt."""

    request: Request
    start: int  # position of the first token among them
    logprobs: list[Any]


def choose_rows(
    logits: Tensor, requests: Sequence[Request], sampler: RequestSampler, num_unknown: int
) -> Chosen | None:
    """Do the same as ``select_rows``, but without waiting for the device or changing ``logits [S, vocab]``. Returns
    None if the host is needed.

    ``num_unknown``: the number of tokens that each request has beyond those that the host knows.

    Raises:
        torch.AcceleratorError: the device has failed.
    """
    selectors = {id(_selector_of(request, sampler)) for request in requests}
    if len(selectors) != 1:
        return None
    selector = _selector_of(requests[0], sampler)
    if not _chooses_as_it_selects(type(selector)):
        return None
    try:
        chosen = selector.choose(logits, requests, num_unknown)
        if chosen is not None and chosen.token_ids.shape != (len(requests),):
            raise ValueError(f"{list(chosen.token_ids.shape)} tokens were chosen for {len(requests)} rows")
        return chosen
    except torch.AcceleratorError:
        raise
    except BaseException as error:  # ``select_rows`` will call the selector again, and handle its failure
        if interrupts_the_process(error):
            raise
        _log.debug("tokens could not be chosen ahead", exc_info=True)
        return None


def fetch_rows(chosen: Chosen, requests: Sequence[Request], vocab_size: int) -> Selection:
    """Wait for tokens that were chosen without the host, and return them.

    Raises:
        torch.AcceleratorError: the device has failed.
    """
    try:
        return checked(chosen.fetch(), requests, vocab_size)
    except BaseException as error:
        if _is_no_requests(error):
            raise
        return _failed(requests, error)


def select_rows(
    logits: Tensor, requests: Sequence[Request], sampler: RequestSampler, *, again: bool = True
) -> Selection:
    """Call each selector once, with its own rows. ``again``: the caller can call ``sampler`` again if memory runs out.

    Raises:
        torch.OutOfMemoryError: only if ``again``: ``sampler`` has no room for its rows, and no other selector was
            called. Some logits may be overwritten.
        torch.AcceleratorError: the device has failed.
    """
    if requests and all(request.selector is requests[0].selector for request in requests):
        return _ask(requests, logits, sampler, again)
    rows_of: dict[int, list[int]] = {id(sampler): []}  # the sampler comes first
    for row, request in enumerate(requests):
        rows_of.setdefault(id(_selector_of(request, sampler)), []).append(row)
    token_ids: list[int | None] = [0] * len(requests)
    logprobs: list[Any] = [None] * len(requests)
    parents = list(range(len(requests)))
    errors: dict[int, str] = {}
    finished: dict[int, FinishReason] = {}
    for rows in filter(None, rows_of.values()):
        part = _ask([requests[row] for row in rows], logits[rows], sampler, again)
        for i, row in enumerate(rows):
            token_ids[row] = part.token_ids[i]
            logprobs[row] = part.logprobs[i] if part.logprobs is not None else None
            parents[row] = rows[part.parents[i]] if part.parents is not None else row
        errors.update((rows[i], message) for i, message in (part.errors or {}).items())
        finished.update((rows[i], reason) for i, reason in (part.finished or {}).items())
    return Selection(token_ids, logprobs, errors, parents, finished)


def prompt_logprobs_of(
    logits: Tensor, prompt_rows: Sequence[PromptRows], sampler: RequestSampler, *, again: bool = True
) -> tuple[list[PromptLogprobs], dict[Group, str]]:
    """Return for ``logits [P, vocab]`` of prompt positions the Logprobs of the tokens that follow, and an error for
    each group for which the sampler failed. ``again``: see ``select_rows``.

    Raises:
        torch.OutOfMemoryError: only if ``again``: ``sampler`` has no room.
        torch.AcceleratorError: the device has failed.
    """
    told, failed, row = [], {}, 0
    for request, start, num in prompt_rows:
        next_ids = request.tokens[start + 1 : start + 1 + num]
        try:
            asked = request.params.prompt_logprobs or 0
            found = list(sampler.prompt_logprobs(logits[row : row + num], next_ids, asked))
            if len(found) != num:
                raise ValueError(f"logprobs of {len(found)} positions came for {num}")
            told.append(PromptLogprobs(request, start + 1, found))
        except BaseException as error:
            if _is_no_requests(error) or (again and isinstance(error, torch.OutOfMemoryError)):
                raise
            failed[request.group] = f"the logprobs of its prompt could not be told: {error!r}"
        row += num
    return told, failed


class OneByOne(RequestSampler):
    """Calls a selector with one row at a time, to need less memory. For selectors whose rows don't depend on each
    other."""

    def __init__(self, selector: RequestSampler) -> None:
        self._selector = selector

    def select(self, logits: Tensor, requests: Sequence[Request]) -> Selection:
        parts = [
            _select(self._selector, logits[row : row + 1], [request], again=False)
            for row, request in enumerate(requests)
        ]
        return Selection(
            [part.token_ids[0] for part in parts],
            [part.logprobs[0] if part.logprobs else None for part in parts],
            {row: part.errors[0] for row, part in enumerate(parts) if part.errors},
        )

    def prompt_logprobs(self, logits: Tensor, next_ids: Sequence[int], num: int) -> Iterable[Mapping[int, Any]]:
        for row, next_id in enumerate(next_ids):
            yield from self._selector.prompt_logprobs(logits[row : row + 1], [next_id], num)


def _ask(requests: Sequence[Request], logits: Tensor, sampler: RequestSampler, again: bool) -> Selection:
    """Return the choice of the one selector of all these rows."""
    selector = _selector_of(requests[0], sampler)
    return _select(selector, logits, requests, again=again and selector is sampler)


def _select(selector: TokenSelector, logits: Tensor, requests: Sequence[Request], *, again: bool) -> Selection:
    """Call a selector. ``again``: the caller can call it again if memory runs out."""
    try:
        return checked(selector.select(logits, requests), requests, logits.shape[1])
    except BaseException as error:
        if _is_no_requests(error) or (again and isinstance(error, torch.OutOfMemoryError)):
            raise
        return _failed(requests, error)


def _failed(requests: Sequence[Request], error: BaseException) -> Selection:
    message = f"{FAILED}: {error if type(error) is ValueError else repr(error)}"
    return Selection([0] * len(requests), errors=dict.fromkeys(range(len(requests)), message))


def _is_no_requests(error: BaseException) -> bool:
    """Return whether the error concerns more than a selector: the device has failed, or the process was interrupted."""
    return isinstance(error, torch.AcceleratorError) or interrupts_the_process(error)


def _selector_of(request: Request, sampler: RequestSampler) -> TokenSelector:
    return sampler if request.selector is None else request.selector


def _chooses_as_it_selects(kind: type) -> bool:
    """Return whether the class that defines ``select`` also defines ``choose``, or a subclass of it does. Otherwise
    ``choose`` may choose differently. Selectors of other projects may have no ``choose``."""
    for base in kind.__mro__:
        if "choose" in vars(base):
            return True
        if "select" in vars(base):
            return False
    return False

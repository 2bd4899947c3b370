"""Checks what a selector returns. A row with an invalid result ends with an error; other rows go on.

This file knows Selections and their rows. It does not know how tokens are chosen.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from paged_core.scheduling.request import FinishReason, Request, Selection

FAILED = "choosing the next token failed"  # how error messages of selectors begin


def checked(answer: Any, requests: Sequence[Request], vocab_size: int) -> Selection:
    """Return ``answer`` in the form that the Scheduler takes: token ids as ints, and an error for each invalid row.

    Raises:
        ValueError: it is no Selection, or has another number of rows.
    """
    if not isinstance(answer, Selection):
        raise ValueError(f"a selector must answer a Selection, and not a {type(answer).__name__}")
    num = len(requests)
    _check_length("token_ids", answer.token_ids, num)
    if _is_plain(answer, vocab_size):
        return answer
    for name in ("logprobs", "parents"):
        if getattr(answer, name) is not None:
            _check_length(name, getattr(answer, name), num)
    errors = {_row("errors", row, num): str(why) for row, why in (answer.errors or {}).items()}
    finished = {_row("finished", row, num): reason for row, reason in (answer.finished or {}).items()}
    token_ids, parents, logprobs = list(answer.token_ids), list(answer.parents or range(num)), answer.logprobs
    for row, request in enumerate(requests):
        try:
            if row not in errors:
                token_ids[row] = _token(token_ids[row], request, vocab_size)
            parents[row] = _parent(parents[row], row, requests)
            _check_news(logprobs[row] if logprobs is not None else None, finished.get(row))
        except ValueError as error:
            errors.setdefault(row, f"{FAILED}: {error}")
            parents[row] = row
    errors |= _halves_of_groups(token_ids, requests, errors)
    return Selection(token_ids, logprobs, errors or None, parents if answer.parents else None, finished or None)


def _is_plain(answer: Selection, vocab_size: int) -> bool:
    """Return whether it is valid and holds token ids only, as nearly all Selections do."""
    more = (answer.logprobs, answer.errors, answer.parents, answer.finished)
    return more == (None,) * 4 and all(type(token) is int and 0 <= token < vocab_size for token in answer.token_ids)


def _check_length(name: str, values: Any, num: int) -> None:
    if not hasattr(values, "__len__") or len(values) != num:
        found = f"{len(values)} entries" if hasattr(values, "__len__") else repr(values)
        raise ValueError(f"a selector's {name} must have one entry a row, {num}, and not {found}")


def _row(name: str, row: Any, num: int) -> int:
    found = _as_int(row)
    if found is None or not 0 <= found < num:
        raise ValueError(f"a selector's {name} speak of row {row!r}; there are rows 0 to {num - 1}")
    return found


def _token(token: Any, request: Request, vocab_size: int) -> int | None:
    if token is None:
        if request.selector is None:
            raise ValueError("the engine's sampler chose no token; only a request's own selector may do so later")
        return None
    found = _as_int(token)
    if found is None or not 0 <= found < vocab_size:
        raise ValueError(f"{token!r} was chosen; token ids go from 0 to {vocab_size - 1}")
    return found


def _parent(parent: Any, row: int, requests: Sequence[Request]) -> int:
    found, group = _as_int(parent), requests[row].group
    if found == row:
        return row
    if found is None or not 0 <= found < len(requests) or not group.lockstep or requests[found].group is not group:
        raise ValueError(f"row {row} can't go on from row {parent!r}; only from a row of its own lockstep group")
    return found


def _check_news(logprobs: Any, reason: Any) -> None:
    if logprobs is not None and not isinstance(logprobs, Mapping):
        raise ValueError(f"a row's logprobs must be a dict, token id -> Logprob, and not {logprobs!r}")
    if reason is not None and not isinstance(reason, FinishReason):
        raise ValueError(f"a row's verdict must be a FinishReason, and not {reason!r}")


def _halves_of_groups(
    token_ids: Sequence[int | None], requests: Sequence[Request], errors: Mapping[int, str]
) -> dict[int, str]:
    """Return errors for lockstep groups of which only some rows would be held."""
    held: dict[int, bool] = {}  # by id() of the group
    found = {}
    for row, (token, request) in enumerate(zip(token_ids, requests, strict=True)):
        if not request.group.lockstep or row in errors:
            continue
        if held.setdefault(id(request.group), token is None) != (token is None):
            found[row] = f"{FAILED}: a lockstep group gets all of its tokens at once, or none"
    return found


def _as_int(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None

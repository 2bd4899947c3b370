"""Checks of a request before it is queued. They look at token ids only; the scheduler checks sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from paged_core.scheduling.params import InvalidRequestError, SamplingParams
from paged_core.scheduling.request import Request


def check_prompt(prompt: Sequence[int], vocab_size: int, knows: Callable[[int], bool]) -> None:
    """Raises InvalidRequestError if the prompt is empty or a byte string, or holds ids outside the vocabulary that the
    model does not know either (``knows``)."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        told = f"the prompt is of type {type(prompt).__name__}; give token ids"
        raise InvalidRequestError(told, "prompt")
    if not len(prompt):
        told = "the prompt is empty; give at least one token (for example the model's bos token)"
        raise InvalidRequestError(told, "prompt")
    for token in prompt:
        if not isinstance(token, int) or not (0 <= token < vocab_size or knows(token)):
            told = f"the prompt holds token id {token!r}; ids go from 0 to {vocab_size - 1}"
            raise InvalidRequestError(told, "prompt")


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequestError for ids outside the vocabulary. It names the parameter that holds them."""
    named: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
        "bad_words_token_ids": [token for word in params.bad_words_token_ids for token in word],
    }
    for name, tokens in named.items():
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise InvalidRequestError(f"{name} holds token id {token!r}; ids go from 0 to {vocab_size - 1}", name)


def check_resumed(
    requests: Sequence[Request], token_ids: Sequence[int], parents: Sequence[int] | None, vocab_size: int
) -> None:
    """Raises InvalidRequestError for a request that isn't held or has reached its length, for a part of a lockstep
    group, for an unknown token, and for a parent that is no row of the same group."""
    if len(requests) != len(token_ids):
        raise InvalidRequestError(f"{len(token_ids)} tokens were given for {len(requests)} requests")
    if len(set(requests)) != len(requests):
        raise InvalidRequestError("a request was given twice; give each once, with its one token")
    for request, token in zip(requests, token_ids, strict=True):
        if not request.held or request.finished:
            raise InvalidRequestError(f"{request!r} isn't held: there is nothing to resume")
        if len(request.tokens) + 1 >= request.max_total:
            raise InvalidRequestError(
                f"{request!r} has no room for another token (max_tokens {request.params.max_tokens})"
            )
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequestError(f"token id {token!r} was chosen; ids go from 0 to {vocab_size - 1}")
    for group in {id(request.group): request.group for request in requests if request.group.lockstep}.values():
        for row in group.members:
            if not row.finished and row not in requests:
                raise InvalidRequestError(f"{row!r} is to advance with the rows of its group; resume all of them")
    if parents is not None:
        _check_parents(requests, parents)


def _check_parents(requests: Sequence[Request], parents: Sequence[int]) -> None:
    if len(parents) != len(requests):
        raise InvalidRequestError(f"{len(parents)} parents were given for {len(requests)} requests")
    for row, parent in enumerate(parents):
        known = isinstance(parent, int) and 0 <= parent < len(requests)
        if not known or requests[parent].group is not requests[row].group:
            raise InvalidRequestError(f"row {row} can't go on from row {parent!r}; only from a row of its own group")

"""The meaning of an attention mask's rule: causality, a sliding window, or chunks. transformers makes masks from
functions of (batch, head, query, key). This file calls such a function at a few decisive positions. It knows nothing of
models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FAR = 3 * 5 * 7 << 20  # a position beyond every window, and where chunks of any usual size begin
WIDEST = 1 << 17  # windows up to here are recognised by masks; wider ones need the argument sliding_window


def window_of(rule: Any) -> int | None:
    """The sliding window of a mask's rule; None: plain causality.

    Raises:
        ValueError: it is neither; the message shows the values.
    """

    def visible(query: int, distances: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        seen = rule(zero, zero, torch.full_like(distances, query), query - distances)
        return torch.as_tensor(seen).expand(distances.shape)

    hidden = (~visible(FAR, torch.arange(WIDEST))).nonzero()
    window = int(hidden[0]) if hidden.numel() else None
    edge = window or 4096
    distances = torch.tensor([-7, -1, 0, edge - 1, edge, edge + 1, 128, 1024, 8192, 32768, WIDEST - 1])
    expected = (distances >= 0) & (distances < (window or FAR))
    for query in (FAR, FAR + 1, FAR + 5, FAR + 1234, FAR + 54321):
        wrong = (visible(query, distances) != expected).nonzero()
        if wrong.numel():
            raise ValueError(
                f"is neither causal nor a sliding window: position {query} and the key {int(distances[wrong[0]])} "
                "before it are treated otherwise than elsewhere"
            )
    return window


def causal_until(rule: Any) -> int | None:
    """The size of the first chunk of chunked attention, within which it is plainly causal."""
    zero = torch.zeros((), dtype=torch.int64)
    queries = torch.arange(WIDEST)
    hidden = (~torch.as_tensor(rule(zero, zero, queries, zero)).expand(queries.shape)).nonzero()
    if not hidden.numel() or int(hidden[0]) < 2:
        return None
    chunk = int(hidden[0])
    for query in (0, 1, chunk // 2, chunk - 1):
        keys = torch.arange(chunk + 7)
        if not torch.equal(torch.as_tensor(rule(zero, zero, zero + query, keys)).expand(keys.shape), keys <= query):
            return None
    return chunk

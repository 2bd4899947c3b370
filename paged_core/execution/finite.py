"""Checks whether a step's results are finite. If those of a request aren't, no other request may use its K/V.

A NaN in a token's hidden states or K/V also appears in the token's own logits, and in those of every later token that
attends to it. So the last row of logits of a chunk is enough to check the whole chunk. That reads one row of logits,
which is there anyway, instead of all K/V.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from paged_core.execution.staging import Download, take_rows
from paged_core.scheduling.request import Request


class FiniteCheck:
    """A check of row ``rows[i]`` of ``logits [N, vocab]`` for each of ``requests``. It runs on the device, and the host
    does not wait."""

    def __init__(self, logits: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> None:
        self._requests = requests
        # A model may forbid tokens with -inf. amax returns NaN if any element is NaN.
        self._finite = Download(take_rows(logits, rows).amax(-1).isfinite()) if rows else None

    def failed(self) -> Collection[Request]:
        """Wait for the result. Returns the requests with a row that contains NaN or +inf, or nothing but -inf."""
        if self._finite is None:
            return ()
        return [request for request, finite in zip(self._requests, self._finite.wait(), strict=True) if not finite]

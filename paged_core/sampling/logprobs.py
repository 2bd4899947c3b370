"""Log-probabilities of chosen tokens and of the most likely ones, as the caller gets them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_core.execution.staging import take_rows, upload
from paged_core.sampling.draw import top_rows
from paged_core.scheduling.request import Logprob


def top_logprobs(logprobs: Tensor, chosen: Sequence[int], nums: Sequence[int]) -> list[dict[int, Logprob]]:
    """Return for each row of ``logprobs float32 [N,V]`` its chosen token, then the ``nums[row]`` most likely.

    A rank is 1 plus the number of tokens that are more likely; equals share a rank.
    """
    ids = upload(torch.tensor(chosen, dtype=torch.int64), logprobs.device)[:, None]
    values = logprobs.gather(1, ids)  # [N,1]
    most = min(max(nums, default=0), logprobs.shape[1])
    top_values, top_ids = top_rows(logprobs, most) if most else (logprobs[:, :0], ids[:, :0])
    fetched = torch.cat([top_ids.double(), top_values.double(), values.double()], 1).tolist()  # one transfer for all
    likeliest = [
        _ranked([int(token) for token in row[:num]], row[most : most + num])
        for row, num in zip(fetched, (min(num, most) for num in nums), strict=True)
    ]
    # Ranks of chosen tokens that are not among the most likely are counted, which reads the whole vocabulary.
    unranked = [row for row, token in enumerate(chosen) if token not in likeliest[row]]
    if unranked:
        above = (take_rows(logprobs, unranked) > take_rows(values, unranked)).sum(1, dtype=torch.int32).tolist()
        for row, count in zip(unranked, above, strict=True):
            likeliest[row][chosen[row]] = Logprob(fetched[row][-1], count + 1)
    return [{token: found[token], **found} for token, found in zip(chosen, likeliest, strict=True)]


def _ranked(ids: list[int], values: list[float]) -> dict[int, Logprob]:
    """Rank ``values``, which are in falling order; equals have the rank of the first one."""
    ranked = {}
    rank, previous = 0, None
    for place, (id, value) in enumerate(zip(ids, values, strict=True), start=1):
        if value != previous:
            rank, previous = place, value
        ranked[id] = Logprob(value, rank)
    return ranked

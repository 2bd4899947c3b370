"""Log-probabilities of chosen tokens and of the likeliest ones, as the caller sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paged_core.execution.sampling_draw import top_rows
from paged_core.scheduling.request import Logprob


def top_logprobs(logprobs: Tensor, chosen: Sequence[int], nums: Sequence[int]) -> list[dict[int, Logprob]]:
    """``logprobs float32 [N,V]`` -> for each row its chosen token, then the ``nums[row]`` likeliest.

    A rank is 1 plus the number of tokens that are likelier: equals share one.
    """
    device = logprobs.device
    ids = torch.tensor(chosen, dtype=torch.int64, device=device)[:, None]
    values = logprobs.gather(1, ids)  # [N,1]
    ranks = ((logprobs > values).sum(1, dtype=torch.int32) + 1).tolist()
    most = min(max(nums, default=0), logprobs.shape[1])
    top_values, top_ids = top_rows(logprobs, most) if most else (logprobs[:, :0], ids[:, :0])
    answer = []
    for row, (token, value, rank) in enumerate(zip(chosen, values[:, 0].tolist(), ranks, strict=True)):
        found = {token: Logprob(value, rank)}
        answer.append(found)
        likeliest = zip(top_ids[row].tolist(), top_values[row].tolist(), strict=True)
        above, previous = 0, None
        for place, (id, value_of_id) in enumerate(likeliest):
            if place == nums[row]:
                break
            if value_of_id != previous:
                above, previous = place, value_of_id
            found.setdefault(id, Logprob(value_of_id, above + 1))
    return answer

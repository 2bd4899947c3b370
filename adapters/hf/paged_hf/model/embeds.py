"""Prompts that are embeddings: token ids above every vocabulary stand for them, so that the engine sees ids only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_FIRST = 1 << 40  # no id is used twice, because equal ids mean equal tokens to the prefix cache


class Embeds:
    """The embeddings of one model's prompts, by id."""

    def __init__(self) -> None:
        self._next = _FIRST
        self._rows: dict[int, Tensor] = {}  # [hidden] each

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._rows

    def acquire(self, rows: Tensor) -> list[int]:
        """``rows [n, hidden]`` -> their ids, until ``release``."""
        ids = list(range(self._next, self._next + len(rows)))
        self._next += len(rows)
        self._rows.update(zip(ids, rows.detach().unbind(), strict=True))
        return ids

    def release(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            self._rows.pop(token_id, None)

    def among(self, token_ids: Tensor) -> bool:
        """Whether any of ``token_ids i64 [T]`` is one of ours."""
        return bool(self._rows) and bool((token_ids >= _FIRST).any())

    def of(self, token_ids: Tensor, embedding: nn.Module) -> Tensor:
        """``i64 [T] -> [T, hidden]``: the model's own, and those of prompts."""
        given = token_ids >= _FIRST
        embeds: Tensor = embedding(token_ids.masked_fill(given, 0)).clone()
        if bool(given.any()):
            own = torch.stack([self._rows[token_id] for token_id in token_ids[given].tolist()])
            embeds[given] = own.to(embeds.device)
        return embeds


def takes_embeds(model: nn.Module) -> bool:
    """Whether the model computes the same from its own embeddings as from token ids; some look at both."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    device = next(embedding.parameters()).device
    ids = torch.arange(1, 8, device=device)[None]
    with torch.no_grad():
        try:
            want = model(input_ids=ids, use_cache=False).logits
            got = model(inputs_embeds=embedding(ids), use_cache=False).logits
        except Exception:
            return False
    return torch.equal(got, want)

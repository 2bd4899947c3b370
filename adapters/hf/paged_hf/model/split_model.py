"""One rank's shard of a transformers model as a PagedModel. Nobody but the engine has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from paged_core import UnsupportedModel
from paged_hf.model.paged_model import HFPagedModel


class SplitPagedModel(HFPagedModel):
    """One of ``num_ranks`` shards that run the same steps. Its weights never change.

    Raises:
        UnsupportedModel: as HFPagedModel.
    """

    compilable = False

    def __init__(self, model: nn.Module, name: str, num_ranks: int) -> None:
        super().__init__(model, name)
        self.num_ranks = num_ranks

    def refresh(self) -> bool:
        """Never needed: nobody can have changed the shard, and one rank alone could not examine the model again."""
        return False

    def fingerprint(self) -> str | None:
        """None: this rank's weights don't identify the model."""
        return None

    def acquire_ids(self, embeds: Tensor) -> list[int]:
        raise UnsupportedModel("it is split over ranks, which take token ids only")

    def release_ids(self, token_ids: Sequence[int]) -> None:
        """There are none."""

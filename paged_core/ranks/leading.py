"""LeadingRunner: the ModelRunner of rank 0. It sends each call to the other ranks before it carries it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paged_core.errors import EngineDeadError, InvalidRequestError
from paged_core.execution.batch import Batch
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.model import AttentionBackend, PagedModel
from paged_core.execution.model_runner import ModelRunner
from paged_core.ranks.orders import Grow, Move, Release, RunBatch
from paged_core.ranks.processes import RankProcesses
from paged_core.scheduling.block_table import BlockMove


class LeadingRunner(ModelRunner):
    """A ModelRunner whose orders go to ``others`` first. ``close`` ends the other ranks, and may be called again."""

    def __init__(
        self,
        model: PagedModel,
        backend: AttentionBackend,
        cache: KVCache,
        others: RankProcesses,
        close: Callable[[], None],
    ) -> None:
        super().__init__(model, backend, cache)
        self._others = others
        self._close = close

    @property
    def trouble(self) -> str | None:
        return self._others.trouble

    def grow(self, num_blocks: int) -> None:
        if num_blocks > self.cache.num_blocks:
            self._others.send(Grow(num_blocks))
        super().grow(num_blocks)

    def release(self) -> None:
        self._others.send(Release())
        super().release()

    def move_blocks(self, moves: Sequence[BlockMove]) -> None:
        if moves:
            self._others.send(Move(moves))
        super().move_blocks(moves)

    def run(self, batch: Batch, *, eager: bool = False) -> Tensor:
        """See ModelRunner.run.

        Raises:
            EngineDeadError: a rank has died or failed, this one included. The ranks' states then differ for good.
        """
        try:
            self._others.send(RunBatch.of(batch))
            with self._others.at_work():
                logits = super().run(batch, eager=eager)
                if logits.is_cuda:  # wait here, where a rank that dies meanwhile is noticed
                    torch.cuda.current_stream(logits.device).synchronize()
                return logits
        except EngineDeadError:
            self.close()
            raise

    def read(self, block_table: Sequence[int], num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        raise InvalidRequestError(
            "K/V can't be read where they are spread over ranks (tensor_parallel_size); leave it out to read them"
        )

    def close(self) -> None:
        self._close()

"""The orders that rank 0 sends to the other ranks' runners. They hold integers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from paged_core.execution.batch import AttentionMetadata, Batch
from paged_core.execution.model_runner import ModelRunner
from paged_core.scheduling.block_table import BlockMove


class Order(Protocol):
    """An order, which can be pickled."""

    def carry_out(self, runner: ModelRunner, device: torch.device) -> None: ...


class RunBatch(NamedTuple):
    """Compute a batch like rank 0's, without its requests."""

    integers: tuple[Any, ...]  # numpy arrays, shaped as in Batch: token_ids, positions, query_starts, seq_lens,
    # block_tables, slot_mapping, sample_indices
    max_query_len: int
    max_seq_len: int
    decode: bool

    @staticmethod
    def of(batch: Batch) -> RunBatch:
        at = batch.attention
        tensors = (batch.token_ids, batch.positions, at.query_starts, at.seq_lens, at.block_tables, at.slot_mapping)
        integers = tuple(tensor.cpu().numpy() for tensor in (*tensors, batch.sample_indices))
        return RunBatch(integers, at.max_query_len, at.max_seq_len, batch.decode)

    def carry_out(self, runner: ModelRunner, device: torch.device) -> None:
        ids, positions, starts, lens, tables, slots, wanted = (_tensor(array, device) for array in self.integers)
        attention = AttentionMetadata(starts, lens, tables, slots, self.max_query_len, self.max_seq_len)
        runner.run(Batch(ids, positions, attention, wanted, (), (), (), self.decode))


class Move(NamedTuple):
    """Move blocks, in this order."""

    moves: Sequence[BlockMove]

    def carry_out(self, runner: ModelRunner, device: torch.device) -> None:
        runner.move_blocks(self.moves)


class Grow(NamedTuple):
    """Allocate memory for this many blocks."""

    num_blocks: int

    def carry_out(self, runner: ModelRunner, device: torch.device) -> None:
        runner.grow(self.num_blocks)


class Release(NamedTuple):
    """Free the cache's memory."""

    def carry_out(self, runner: ModelRunner, device: torch.device) -> None:
        runner.release()


def _tensor(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)

"""A Schedule as tensors: what the model and the attention backend see of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Schedule, ScheduledChunk


@dataclass(frozen=True)
class AttentionMetadata:
    """Where this step's queries and their keys are. Request r owns tokens query_starts[r]:query_starts[r+1]; they are
    the last of its seq_lens[r] tokens, so causality needs no positions."""

    query_starts: Tensor  # int32 [R+1]  first token of each request, then T
    seq_lens: Tensor  # int32 [R]  tokens whose K/V are in the cache once this step has stored its own
    block_tables: Tensor  # int32 [R,B]  block ids; rows are padded with block 0
    slot_mapping: Tensor  # int64 [T]  where this step's K/V go: block_id * block_size + offset
    max_query_len: int
    max_seq_len: int


class PromptRows(NamedTuple):
    """Prompt positions whose logits were asked for (prompt_logprobs)."""

    request: Request
    start: int  # position of the first
    num: int


@dataclass(frozen=True)
class Batch:
    """One step for the model: T tokens of R requests, packed without padding."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionMetadata
    sample_indices: Tensor  # int64 [S + P]  tokens whose logits are wanted: sampled rows, then prompt_rows'
    sample_requests: tuple[Request, ...]  # S rows, siblings of a fork side by side
    prompt_rows: tuple[PromptRows, ...]  # P positions together


class BatchBuilder:
    """Builds batches. Keeps each request's block table as a tensor row from step to step, and appends to it.

    Args:
        block_size: slots in a block.
        device: where the model wants its tensors.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        # On the host and in numpy: gathering a few rows is no work to wake a pool of threads for.
        self._tables = np.zeros((0, 0), dtype=np.int32)
        self._rows: dict[Request, _Row] = {}
        self._spare: list[int] = []

    def build(self, schedule: Schedule) -> Batch:
        """The batch of a schedule that has at least one chunk."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts, seq_lens, rows = [0], [], []
        sample_indices: list[int] = []
        sample_requests: list[Request] = []
        size = self._block_size
        for request, start, num_tokens, samples in schedule.chunks:
            end = start + num_tokens
            table = request.block_table
            if num_tokens == 1:
                token_ids.append(request.tokens[start])
                positions.append(start)
                slots.append(table[start // size] * size + start % size)
            else:
                token_ids += request.tokens[start:end]
                positions += range(start, end)
                slots += [table[p // size] * size + p % size for p in range(start, end)]
            rows.append(self._row(request))
            seq_lens.append(end)
            query_starts.append(len(token_ids))
            if samples:
                sample_indices += [len(token_ids) - 1] * len(samples)
                sample_requests += samples
        prompt_rows = _prompt_rows(schedule.chunks)
        for index, chunk_rows in prompt_rows:
            first = query_starts[index] + chunk_rows.start - schedule.chunks[index].start
            sample_indices += range(first, first + chunk_rows.num)
        max_seq_len = max(seq_lens)
        tables = torch.from_numpy(self._tables[rows, : -(-max_seq_len // size)])  # int32 [R,B]
        return Batch(
            self._long(token_ids),
            self._long(positions),
            AttentionMetadata(
                torch.tensor(query_starts, dtype=torch.int32, device=self._device),
                torch.tensor(seq_lens, dtype=torch.int32, device=self._device),
                tables.to(self._device),
                self._long(slots),
                max(c.num_tokens for c in schedule.chunks),
                max_seq_len,
            ),
            self._long(sample_indices),
            tuple(sample_requests),
            tuple(chunk_rows for _, chunk_rows in prompt_rows),
        )

    def _long(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _row(self, request: Request) -> int:
        """The row of ``_tables`` that holds this request's block table, brought up to date."""
        row = self._rows.get(request)
        table = request.block_table
        if row is None:
            row = self._rows[request] = _Row(self._take_row())
        if row.version != request.table_version:
            row.version, row.length = request.table_version, 0
        if row.length < len(table):
            if len(table) > self._tables.shape[1]:
                self._grow(self._tables.shape[0], max(2 * self._tables.shape[1], len(table), 16))
            self._tables[row.index, row.length : len(table)] = table[row.length :]
            row.length = len(table)
        return row.index

    def _take_row(self) -> int:
        if not self._spare:
            gone = [request for request in self._rows if not request.block_table]
            self._spare = [self._rows.pop(request).index for request in gone]
        if not self._spare:
            num_rows = self._tables.shape[0]
            self._grow(max(2 * num_rows, 16), self._tables.shape[1])
            self._spare = list(range(num_rows, self._tables.shape[0]))
        return self._spare.pop()

    def _grow(self, num_rows: int, num_columns: int) -> None:
        old = self._tables
        self._tables = np.zeros((num_rows, num_columns), dtype=np.int32)
        self._tables[: old.shape[0], : old.shape[1]] = old


class _Row:
    __slots__ = ("index", "length", "version")

    def __init__(self, index: int) -> None:
        self.index = index
        self.version = -1
        self.length = 0  # entries already written


def _prompt_rows(chunks: Sequence[ScheduledChunk]) -> list[tuple[int, PromptRows]]:
    """(chunk index, rows) of the prompt positions in these chunks whose next token's logprob is still wanted."""
    found = []
    for i, (request, start, num_tokens, _) in enumerate(chunks):
        if not request.wants_prompt_logprobs or start + 1 >= request.num_prompt:
            continue
        num = min(start + num_tokens, request.num_prompt - 1) - start
        found.append((i, PromptRows(request, start, num)))
    return found

"""A Schedule as tensors: what the model and the attention backend see of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paged_core.execution.staging import upload_fields
from paged_core.execution.table_rows import TableRows
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
    sample_indices: Tensor  # int64 [S + P + E]  tokens whose logits are wanted: sampled rows, prompt_rows', ends'
    sample_requests: tuple[Request, ...]  # S rows, siblings of a fork side by side
    prompt_rows: tuple[PromptRows, ...]  # P positions together
    ends: tuple[Request, ...]  # E rows: the last token of each chunk that samples nothing, to see that it is finite
    decode: bool  # every request computes one token that it was given by a step before, and samples: T = R = S, no more


class BatchBuilder:
    """Builds batches: all integers of a step travel to the device in one copy.

    Args:
        block_size: slots in a block.
        device: where the model wants its tensors.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = TableRows(device)

    def build(self, schedule: Schedule, known: Tensor | None = None) -> Batch:
        """The batch of a schedule that has at least one chunk. ``known i64 [T]``: the token ids are on the device and
        nowhere else yet; every chunk has one token."""
        try:
            return self._build(schedule, known)
        except BaseException:  # an interrupt of the process among them
            self._tables.forget()  # what should have been written may not have been
            raise

    def _build(self, schedule: Schedule, known: Tensor | None) -> Batch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts, seq_lens, rows = [0], [], []
        sample_indices: list[int] = []
        sample_requests: list[Request] = []
        size = self._block_size
        decode = True
        for request, start, num_tokens, samples in schedule.chunks:
            end = start + num_tokens
            table = request.block_table
            if num_tokens == 1:
                token_ids.append(request.tokens[start] if known is None else 0)
                positions.append(start)
                slots.append(table[start // size] * size + start % size)
            else:
                token_ids += request.tokens[start:end]
                positions += range(start, end)
                slots += [table[p // size] * size + p % size for p in range(start, end)]
            rows.append(self._tables.row(request))
            seq_lens.append(end)
            query_starts.append(len(token_ids))
            decode = decode and start >= request.num_prompt and num_tokens == len(samples) == 1
            if samples:
                sample_indices += [len(token_ids) - 1] * len(samples)
                sample_requests += samples
        prompt_rows = _prompt_rows(schedule.chunks)
        for index, chunk_rows in prompt_rows:
            first = query_starts[index] + chunk_rows.start - schedule.chunks[index].start
            sample_indices += range(first, first + chunk_rows.num)
        unsampled = [index for index, chunk in enumerate(schedule.chunks) if not chunk.samples]
        sample_indices += [query_starts[index + 1] - 1 for index in unsampled]
        places, blocks = self._tables.news()
        longs = [(values, torch.int64) for values in (token_ids, positions, slots, sample_indices, places)]
        ints = [(values, torch.int32) for values in (query_starts, seq_lens, rows, blocks)]
        ids, at, slot_mapping, wanted, table_places, starts, lens, table_rows, table_blocks = upload_fields(
            [*longs, *ints], self._device
        )
        max_seq_len = max(seq_lens)
        tables = self._tables.gather(table_places, table_blocks, table_rows, -(-max_seq_len // size))  # int32 [R,B]
        max_query_len = max(chunk.num_tokens for chunk in schedule.chunks)
        return Batch(
            ids if known is None else known,
            at,
            AttentionMetadata(starts, lens, tables, slot_mapping, max_query_len, max_seq_len),
            wanted,
            tuple(sample_requests),
            tuple(chunk_rows for _, chunk_rows in prompt_rows),
            tuple(schedule.chunks[index].request for index in unsampled),
            decode,
        )


def _prompt_rows(chunks: Sequence[ScheduledChunk]) -> list[tuple[int, PromptRows]]:
    """(chunk index, rows) of the prompt positions in these chunks whose next token's logprob is still wanted."""
    found = []
    for i, (request, start, num_tokens, _) in enumerate(chunks):
        if not request.wants_prompt_logprobs or start + 1 >= request.num_prompt:
            continue
        num = min(start + num_tokens, request.num_prompt - 1) - start
        found.append((i, PromptRows(request, start, num)))
    return found

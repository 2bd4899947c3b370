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
    """Where this step's queries and their keys are. Request r has the tokens query_starts[r]:query_starts[r+1]. They
    are the last of its seq_lens[r] tokens, so causal attention needs no positions."""

    query_starts: Tensor  # int32 [R+1]  first token of each request, then T
    seq_lens: Tensor  # int32 [R]  tokens whose K/V are in the cache once this step has stored its own
    block_tables: Tensor  # int32 [R,B]  block ids; rows are padded with block 0
    slot_mapping: Tensor  # int64 [T]  where this step's K/V go: block_id * block_size + offset
    max_query_len: int
    max_seq_len: int


class PromptRows(NamedTuple):
    """Prompt positions whose logits were asked for (prompt_logprobs)."""

    request: Request
    start: int  # position of the first one
    num: int


@dataclass(frozen=True)
class Batch:
    """One step for the model: T tokens of R requests, packed without padding."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionMetadata
    sample_indices: Tensor  # int64 [S + P + E]  tokens whose logits are computed: of sampled rows, prompt_rows, ends
    sample_requests: tuple[Request, ...]  # S rows, siblings of a fork side by side
    prompt_rows: tuple[PromptRows, ...]  # P positions together
    ends: tuple[Request, ...]  # E rows: the last token of each chunk that doesn't sample, to check that it is finite
    decode: bool  # each request computes the one token that the last step gave it, and samples: T = R = S; P = E = 0


class BatchBuilder:
    """Builds batches. All integers of a step are copied to the device at once.

    Args:
        block_size: slots in a block.
        device: the device of the model's inputs.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self.tables = TableRows(device)

    def build(self, schedule: Schedule, known: Tensor | None = None) -> Batch:
        """Return the batch of a schedule that has at least one chunk. ``known i64 [T]``: the token ids, which are only
        on the device so far; every chunk then has one token."""
        try:
            return self._build(schedule, known)
        except BaseException:  # also when an interrupt of the process strikes
            self.tables.forget()  # some rows may not have been written
            raise

    def _build(self, schedule: Schedule, known: Tensor | None) -> Batch:
        chunks, size = schedule.chunks, self._block_size
        packed = _pack(chunks, size, on_device=known is not None)
        prompt_rows = _prompt_rows(chunks)
        unsampled = [index for index, chunk in enumerate(chunks) if not chunk.samples]
        wanted = packed.sample_indices + _more_wanted(chunks, packed.query_starts, prompt_rows, unsampled)
        table_rows = [self.tables.row(chunk.request) for chunk in chunks]
        table_places, table_blocks = self.tables.news()
        longs = [packed.token_ids, packed.positions, packed.slots, wanted, table_places]
        ints = [packed.query_starts, packed.seq_lens, table_rows, table_blocks]
        ids, positions, slots, indices, places, starts, lens, rows, blocks = upload_fields(
            [(each, torch.int64) for each in longs] + [(each, torch.int32) for each in ints], self._device
        )
        max_seq_len = max(packed.seq_lens)
        tables = self.tables.gather(places, blocks, rows, -(-max_seq_len // size))  # int32 [R,B]
        max_query_len = max(chunk.num_tokens for chunk in chunks)
        return Batch(
            ids if known is None else known,
            positions,
            AttentionMetadata(starts, lens, tables, slots, max_query_len, max_seq_len),
            indices,
            tuple(packed.sample_requests),
            tuple(chunk_rows for _, chunk_rows in prompt_rows),
            tuple(chunks[index].request for index in unsampled),
            packed.decode,
        )


class _Packed(NamedTuple):
    """Tokens of all chunks, one after another."""

    token_ids: list[int]  # [T]
    positions: list[int]  # [T]
    slots: list[int]  # [T]
    query_starts: list[int]  # [R+1]
    seq_lens: list[int]  # [R]
    sample_indices: list[int]  # [S]
    sample_requests: list[Request]  # [S]
    decode: bool


def _pack(chunks: Sequence[ScheduledChunk], size: int, *, on_device: bool) -> _Packed:
    """Put the tokens of all chunks one after another. ``size``: slots in a block. ``on_device``: token ids are known on
    the device only, and are left out here."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_starts, seq_lens = [0], []
    sample_indices: list[int] = []
    sample_requests: list[Request] = []
    decode = True
    for request, start, num_tokens, samples in chunks:
        end = start + num_tokens
        table = request.block_table
        if num_tokens == 1:
            token_ids.append(0 if on_device else request.tokens[start])
            positions.append(start)
            slots.append(table[start // size] * size + start % size)
        else:
            token_ids += request.tokens[start:end]
            positions += range(start, end)
            slots += [table[p // size] * size + p % size for p in range(start, end)]
        seq_lens.append(end)
        query_starts.append(len(token_ids))
        decode = decode and start >= request.num_prompt and num_tokens == len(samples) == 1
        if samples:
            sample_indices += [len(token_ids) - 1] * len(samples)
            sample_requests += samples
    return _Packed(token_ids, positions, slots, query_starts, seq_lens, sample_indices, sample_requests, decode)


def _more_wanted(
    chunks: Sequence[ScheduledChunk],
    query_starts: Sequence[int],
    prompt_rows: Sequence[tuple[int, PromptRows]],
    unsampled: Sequence[int],
) -> list[int]:
    """Return the tokens whose logits are needed beside those of sampled rows: of prompt rows, then of ends."""
    found: list[int] = []
    for index, rows in prompt_rows:
        first = query_starts[index] + rows.start - chunks[index].start
        found += range(first, first + rows.num)
    return found + [query_starts[index + 1] - 1 for index in unsampled]


def _prompt_rows(chunks: Sequence[ScheduledChunk]) -> list[tuple[int, PromptRows]]:
    """Return (chunk index, rows) for the prompt positions in these chunks whose next token's logprob is still
    needed."""
    found = []
    for i, (request, start, num_tokens, _) in enumerate(chunks):
        if not request.wants_prompt_logprobs or start + 1 >= request.num_prompt:
            continue
        num = min(start + num_tokens, request.num_prompt - 1) - start
        found.append((i, PromptRows(request, start, num)))
    return found

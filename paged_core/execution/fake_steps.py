"""Steps without real requests, to measure a model's memory and to warm it up."""

from __future__ import annotations

from collections.abc import Sequence

from paged_core.execution.spec import ModelSpec
from paged_core.scheduling.block_pool import NULL_BLOCK
from paged_core.scheduling.block_table import BlockTable
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.request import Request
from paged_core.scheduling.schedule import Limits, Schedule, ScheduledChunk


def largest_steps(limits: Limits, block_size: int) -> list[Schedule]:
    """Return steps of the largest size: the most tokens, shared by the most requests; then one token each for the most
    requests at their full length. Their K/V are written to the null block and read from there."""
    length, num = limits.max_model_len, limits.max_num_seqs
    tokens, table = [0] * length, BlockTable([NULL_BLOCK] * -(-length // block_size))
    drawn = SamplingParams(temperature=0.9, top_p=0.9)
    rows = [_row(tokens, table, drawn) for _ in range(num)]
    sizes = [min(length, limits.max_num_batched_tokens // num)] * num
    sizes[0] = min(length, sizes[0] + limits.max_num_batched_tokens - sum(sizes))
    return [
        _step([ScheduledChunk(row, 0, size, (row,)) for row, size in zip(rows, sizes, strict=True)]),
        _step([ScheduledChunk(row, length - 1, 1, (row,)) for row in rows]),
    ]


def first_step(spec: ModelSpec, sizes: Sequence[int], block_size: int) -> tuple[Schedule, int]:
    """Return a first step with ``sizes[i]`` tokens of request i, and the number of blocks that the step uses."""
    chunks, num_blocks = [], 0
    for index, size in enumerate(sizes):
        tokens = [(7 * index + 3 * i + 1) % spec.vocab_size for i in range(size)]
        needed = -(-size // block_size)
        row = _row(tokens, BlockTable(range(num_blocks + 1, num_blocks + 1 + needed)), SamplingParams(temperature=0))
        num_blocks += needed
        chunks.append(ScheduledChunk(row, 0, size, (row,)))
    return _step(chunks), num_blocks


def _row(tokens: list[int], table: BlockTable, params: SamplingParams) -> Request:
    row = Request("fake", (), params)
    row.tokens, row.block_table = tokens, table
    return row


def _step(chunks: Sequence[ScheduledChunk]) -> Schedule:
    return Schedule(chunks, (), ())

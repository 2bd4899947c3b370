"""A Schedule as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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

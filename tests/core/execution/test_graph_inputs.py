"""The memory that graphs read: a step, padding behind it, few launches to get it there. And the logits they write."""

import random
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paged_core.execution.batch import AttentionMetadata, Batch
from paged_core.execution.graphs import DecodeGraphs

VIEWS = ("aten::detach", "aten::select", "aten::slice", "aten::unbind")


class Counting(TorchDispatchMode):
    """Notes operations that launch something on a device: not those that look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name not in VIEWS:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


def decode_batch(num, rnd):
    """A step of ``num`` rows, of random integers above 0."""

    def some(*shape, dtype):
        return torch.tensor([rnd.randrange(1, 99) for _ in range(prod(shape))], dtype=dtype).view(shape)

    ids, positions, slots = (some(num, dtype=torch.int64) for _ in range(3))
    lens, tables = some(num, dtype=torch.int32), some(num, 5, dtype=torch.int32)
    attention = AttentionMetadata(torch.arange(num + 1, dtype=torch.int32), lens, tables, slots, 1, 20)
    return Batch(ids, positions, attention, torch.arange(num), (None,) * num, (), (), True)


def make_graphs():
    """Replayed by doing their work again."""

    def record(work):
        work()
        return work

    return DecodeGraphs(8, 100, 4, torch.device("cpu"), lambda: record)


def rows_of(batch):
    meta = batch.attention
    return batch.token_ids, batch.positions, meta.slot_mapping, meta.seq_lens


def always():
    return True


def test_a_replayed_step_sees_its_rows_and_padding_behind_them_whatever_was_there_before():
    seen = []

    def forward(static):
        seen.append([[x.clone() for x in rows_of(static)], static.attention.block_tables.clone()])
        return torch.zeros(len(static.token_ids), 3)

    graphs, rnd = make_graphs(), random.Random(0)
    for num in [8, 3, 5, 5, 1, 8, 8, 2, *(rnd.randrange(1, 9) for _ in range(60))]:
        if rnd.random() < 0.1:
            graphs.drop()
        batch = decode_batch(num, rnd)
        assert graphs.run(batch, forward, always).shape == (num, 3)
        found, tables = seen[-1]
        for static, given in zip(found, rows_of(batch), strict=True):
            assert torch.equal(static[:num], given)
            assert not static[num:].any()
        assert torch.equal(tables[:num, :5], batch.attention.block_tables)


def test_a_step_of_as_many_rows_as_the_last_takes_three_launches_before_its_replay():
    graphs, rnd = make_graphs(), random.Random(0)
    logits = torch.zeros(4, 3)
    told = []
    for num in (4, 4, 4, 3, 3, 3):
        batch = decode_batch(num, rnd)
        with Counting() as counted:
            graphs.run(batch, lambda static: logits, always)
        told.append(len(counted.launches) - 1)  # the replay's own copies logits
    assert told[1:] == [3, 3, 5, 3, 3]  # where rows have gone, padding takes their places


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_logits_are_what_the_model_gives_after_its_head_was_cast(dtypes):
    graphs = make_graphs()
    for dtype in dtypes:
        wanted = torch.rand(2, 3).to(dtype)
        found = graphs.run(decode_batch(2, random.Random(0)), lambda static, wanted=wanted: wanted, always)
        assert found.dtype is dtype
        assert torch.equal(found, wanted)
        graphs.drop()

"""Batches: the same integers whether they are written in place or travel to a device, where tables are appended to."""

import random

import pytest
import torch

from paged_core.execution.batch import BatchBuilder
from paged_core.execution.staging import upload_fields
from paged_core.scheduling.block_pool import BlockPool
from paged_core.scheduling.params import SamplingParams
from paged_core.scheduling.policies import Fcfs
from paged_core.scheduling.request import Request, Selection
from paged_core.scheduling.schedule import Limits
from paged_core.scheduling.scheduler import Scheduler

BLOCK = 4
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def as_on_a_device(builder, monkeypatch):
    """The builder as it is where block tables live on a device; tells how many table entries each step took there."""
    travelled = []
    builder.tables.in_numpy = False
    news = builder.tables.news

    def counted():
        places, blocks = news()
        travelled.append(len(blocks))
        return places, blocks

    monkeypatch.setattr(builder.tables, "news", counted)
    return travelled


def make_scheduler(window=None, num_blocks=60):
    limits = Limits(8, 24, 400, 0, 256, window)
    return Scheduler(BlockPool(num_blocks, BLOCK), Fcfs(), limits)


def steps(scheduler, rnd):
    """Schedules of requests that come, go, fork, are preempted and slide, until nothing is left."""
    waiting = [
        [Request(str(i), [rnd.randrange(90) for _ in range(rnd.randrange(1, 50))], SamplingParams(max_tokens=40))]
        for i in range(12)
    ]
    for row in list(waiting[3]):
        for index in (1, 2):
            waiting[3].append(Request("3", row.tokens, row.params, index=index, group=row.group))
    while waiting or scheduler.has_work:
        if waiting and rnd.random() < 0.5:
            scheduler.add(waiting.pop())
        schedule = scheduler.schedule()
        if schedule.chunks:
            yield schedule
            rows = sum(len(chunk.samples) for chunk in schedule.chunks)
            scheduler.update(schedule, Selection([rnd.randrange(90) for _ in range(rows)]))


@pytest.mark.parametrize("window", [None, 9], ids=["full", "windowed"])
def test_tables_that_are_appended_to_on_a_device_are_those_that_are_written_on_the_host(window, monkeypatch):
    here, there = (BatchBuilder(BLOCK, torch.device("cpu")) for _ in range(2))
    as_on_a_device(there, monkeypatch)
    scheduler, seen = make_scheduler(window, 300 if window else 60), 0
    for schedule in steps(scheduler, random.Random(3)):
        mine, theirs = here.build(schedule), there.build(schedule)
        for name in ("query_starts", "seq_lens", "block_tables", "slot_mapping"):
            a, b = getattr(mine.attention, name), getattr(theirs.attention, name)
            assert a.dtype is b.dtype
            assert torch.equal(a, b), name
        for row, chunk in zip(theirs.attention.block_tables.tolist(), schedule.chunks, strict=True):
            table = chunk.request.block_table[: len(row)]
            assert row[: len(table)] == table
        seen += 1
    assert seen > 80
    assert window or scheduler.num_preemptions


def test_in_a_steady_decode_only_new_blocks_travel(monkeypatch):
    scheduler, builder = make_scheduler(num_blocks=200), BatchBuilder(BLOCK, torch.device("cpu"))
    travelled = as_on_a_device(builder, monkeypatch)
    for i in range(4):
        scheduler.add([Request(str(i), [i] * 5, SamplingParams(max_tokens=30))])
    while scheduler.has_work:
        schedule = scheduler.schedule()
        builder.build(schedule)
        scheduler.update(schedule, Selection([7] * sum(len(c.samples) for c in schedule.chunks)))
    assert travelled[0] == 4 * 2
    assert sum(travelled) == 4 * -(-34 // BLOCK)  # each block once
    assert travelled.count(0) > 20


def test_a_step_is_a_decode_if_each_request_computes_the_token_it_was_given_last():
    scheduler, builder = make_scheduler(num_blocks=200), BatchBuilder(BLOCK, torch.device("cpu"))

    def step():
        schedule = scheduler.schedule()
        batch = builder.build(schedule)
        scheduler.update(schedule, Selection([7] * len(batch.sample_requests)))
        return batch

    scheduler.add([Request("a", [1], SamplingParams(max_tokens=9))])
    assert not step().decode  # a prompt's only token may stand for an embedding
    batch = step()
    assert batch.decode
    assert batch.sample_indices.tolist() == [0]
    group = Request("b", [2] * 30, SamplingParams(max_tokens=9)).group
    Request("b", [2] * 30, SamplingParams(max_tokens=9), index=1, group=group)
    scheduler.add(group.members)
    assert not step().decode  # a chunk of the prompt
    assert not step().decode  # its rest, where the samples fork
    assert step().decode


@pytest.mark.parametrize("device", DEVICES)
def test_shipped_fields_arrive_as_they_were(device):
    fields = [([1, 2, 1 << 40], torch.int64), ([], torch.int64), ([5, -6, 7], torch.int32), ([8], torch.int32)]
    arrived = upload_fields(fields, torch.device(device))
    for tensor, (values, dtype) in zip(arrived, fields, strict=True):
        assert (tensor.tolist(), tensor.dtype, tensor.device.type) == (values, dtype, device)
    assert len({tensor.untyped_storage().data_ptr() for tensor in arrived}) == 1  # one copy


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_in_flight_is_not_overwritten_by_the_next(device):
    first = upload_fields([([1] * 1000, torch.int64)], torch.device(device))
    for _ in range(50):
        upload_fields([([2] * 1000, torch.int64)], torch.device(device))
    assert first[0].eq(1).all()


def test_a_batch_that_could_not_be_built_leaves_no_gaps_in_the_tables(monkeypatch):
    def no_room(*args):
        raise torch.OutOfMemoryError("no room")

    builder = BatchBuilder(BLOCK, torch.device("cpu"))
    builder.tables.in_numpy = False
    for number, schedule in enumerate(steps(make_scheduler(), random.Random(5))):
        if number % 3 == 1:
            with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
                patched.setattr(builder.tables, "gather", no_room)
                builder.build(schedule)
        batch = builder.build(schedule)
        for row, chunk in zip(batch.attention.block_tables.tolist(), schedule.chunks, strict=True):
            num_blocks = -(-(chunk.start + chunk.num_tokens) // BLOCK)
            assert row[:num_blocks] == chunk.request.block_table[:num_blocks]

"""Blocks in a folder, as one engine sees them."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time

import pytest
import torch

from paged_core.tiers import disk
from paged_core.tiers.slab import Slab
from tier_blocks import BLOCK_BYTES, SHAPE, bytes_of, content, disk_tier, fetched, sound, store


@pytest.fixture
def tier(tmp_path):
    tier = disk_tier(tmp_path)
    yield tier
    tier.close(5.0)


def test_what_is_stored_is_held_and_comes_back(tier):
    store(tier, 1, 2, 3)
    assert [tier.holds(content(n).digest) for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert sound(tier, 3, 1, 4) == [3, 1]
    assert (tier.stats.blocks_out, tier.stats.blocks_in, tier.stats.blocks_lost) == (3, 2, 1)


def test_what_is_stored_outlives_the_one_who_stored_it(tmp_path):
    first = disk_tier(tmp_path)
    store(first, 1, 2)
    first.close(5.0)
    second = disk_tier(tmp_path)
    assert sound(second, 1, 2) == [1, 2]
    second.close(1.0)


def test_one_who_shares_the_folder_finds_what_is_written_meanwhile(tmp_path, tier, monkeypatch):
    monkeypatch.setattr(disk, "_LOOK_S", 0.0)
    other = disk_tier(tmp_path)
    store(tier, 1)
    until = time.monotonic() + 30
    while not other.holds(content(1).digest):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert sound(other, 1) == [1]
    other.close(1.0)


def test_another_salt_and_another_models_blocks_are_not_found(tmp_path, tier):
    store(tier, 1, salt="a")
    assert sound(tier, 1, salt="b") == []
    stranger = disk_tier(tmp_path, shape=type(SHAPE)("cd" * 16, SHAPE.block_bytes, SHAPE.block_size))
    assert not stranger.holds(content(1).digest)
    stranger.close(1.0)


def test_salts_and_nothing_that_tells_them_stand_in_files(tmp_path, tier):
    store(tier, 1, salt="tenant-of-the-house")
    assert all(b"tenant-of-the-house" not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_slow_disk_holds_nobody_up_and_what_it_cant_take_is_dropped(tier, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(Slab, "append", _waiting(Slab.append, go_on))
    monkeypatch.setattr(disk, "_MOST_QUEUED_BYTES", 3 * BLOCK_BYTES)
    for number in range(5):
        tier.store([content(number)], bytes_of(number)[None].clone())  # the disk doesn't move, and this returns
    assert tier.stats.blocks_dropped == 2
    assert sound(tier, 0, 1, 2, 3) == [0, 1, 2], "what waits to be written can be had already"
    go_on.set()
    assert tier.flush(30)
    assert tier.stats.blocks_out == 3


def test_a_block_that_waits_to_be_written_comes_to_nobody_else(tier, monkeypatch):
    written = threading.Event()
    monkeypatch.setattr(Slab, "append", _waiting(Slab.append, written))
    tier.store([content(1, "a")], bytes_of(1)[None])
    try:
        assert sound(tier, 1, salt="a") == [1]
        assert sound(tier, 1, salt="b") == []
        assert fetched(tier, [content(1, "a")._replace(tokens=(9, 9, 9, 9))]) == [None]
    finally:
        written.set()
    assert tier.flush(30)


def test_what_is_being_written_when_the_model_changes_is_not_found(tier, monkeypatch):
    begun, go_on, append = threading.Event(), threading.Event(), Slab.append

    def waiting(*args):
        begun.set()
        assert go_on.wait(30)
        return append(*args)

    monkeypatch.setattr(Slab, "append", waiting)
    tier.store([content(1), content(2)], torch.stack([bytes_of(1), bytes_of(2)]))
    assert begun.wait(30)
    tier.forget()
    assert not tier.holds(content(1).digest) and not tier.holds(content(2).digest)
    go_on.set()
    assert tier.flush(30)
    assert not tier.holds(content(1).digest)
    assert sound(tier, 1, 2) == []


def test_what_writing_takes_is_told(tier):
    assert tier.stats.seconds_out == 0.0
    for _ in range(20):
        store(tier, 1)
    assert tier.stats.seconds_out > 0.0


def _waiting(function, event):
    def waiting(*args):
        assert event.wait(30)
        return function(*args)

    return waiting


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_cant_be_written_is_told_once_and_read_on(tier, monkeypatch, caplog, number):
    store(tier, 1)

    def fails(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", fails)
    with caplog.at_level(logging.WARNING, "paged_core"):
        for block in (2, 3, 4):
            store(tier, block)
    (record,) = caplog.records
    assert os.strerror(number) in record.getMessage()
    assert not tier.wants_more
    assert sound(tier, 1, 2) == [1]


def test_blocks_whose_file_was_deleted_or_cut_are_lost_and_no_error(tmp_path, tier):
    store(tier, 1, 2)
    (path,) = tmp_path.glob("*.kv")
    os.truncate(path, path.stat().st_size - 10)
    assert sound(tier, 1, 2) == [1]
    assert not tier.holds(content(2).digest)
    path.unlink()
    tier._drop_deleted()
    assert not tier.holds(content(1).digest)


def test_after_a_change_of_the_model_nothing_from_before_is_found_and_nothing_is_left_behind(tmp_path, tier):
    store(tier, 1)
    tier.forget()
    assert not tier.holds(content(1).digest)
    store(tier, 2)
    assert sound(tier, 1, 2) == [2]
    tier.close(5.0)
    again = disk_tier(tmp_path)
    assert sound(again, 1, 2) == [1]  # of the model that the folder knows
    again.close(1.0)
    assert len(list(tmp_path.glob("*.kv"))) == 1


def test_the_folder_stays_below_its_limit_and_old_blocks_are_lost(tmp_path):
    small = disk_tier(tmp_path, 80_000)
    for number in range(200):
        store(small, number)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.kv")) <= 80_000
    found = sound(small, *range(200))
    assert 199 in found
    assert 0 not in found
    small.close(1.0)


def test_threads_end_with_the_tier(tmp_path):
    tier = disk_tier(tmp_path)
    store(tier, 1)
    assert sound(tier, 1) == [1]
    tier.close(5.0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("paged-kv")]


def test_a_forked_child_reads_on_and_leaves_its_parents_slab_alone(tmp_path, tier):
    store(tier, 1)
    child = os.fork()
    if child == 0:
        try:
            store(tier, 2)
            os._exit(0 if sound(tier, 1, 2) == [1, 2] else 3)
        finally:
            os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    store(tier, 3)
    assert sound(tier, 1, 3) == [1, 3]
    again = disk_tier(tmp_path)
    assert sound(again, 1, 2, 3) == [1, 2, 3]
    again.close(1.0)


def test_many_blocks_come_in_order_through_little_memory(tier, monkeypatch):
    monkeypatch.setattr(disk, "_PIECE_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(disk, "_MOST_PIECES", 2)
    store(tier, *range(50))
    assert sound(tier, *range(49, -1, -1)) == list(range(49, -1, -1))


def test_blocks_that_wait_to_be_written_tell_nothing_of_the_disks_speed(tier, monkeypatch):
    go_on = threading.Event()
    store(tier, 1)
    monkeypatch.setattr(Slab, "append", _waiting(Slab.append, go_on))
    tier.store([content(2)], bytes_of(2)[None].clone())
    for numbers, timed in (((1,), True), ((2,), False), ((1, 2), False)):
        fetch = tier.fetch([content(number) for number in numbers], threading.Event())
        while not fetch.done:
            time.sleep(0.001)
        (piece,) = fetch.take()
        assert (piece.busy_s > 0) is timed
        tier.give_back(piece)
    go_on.set()

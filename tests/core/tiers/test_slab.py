"""One file of blocks: what comes back is what was written, or nothing."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from paged_core.tiers.slab import Shape, Slab, in_use, size_when_full
from tier_blocks import BLOCK_BYTES, SHAPE, bytes_of, content

SALT = bytes(16)


def written(path, *numbers, capacity=8):
    slab = Slab.create(path, SHAPE, capacity)
    for number in numbers:
        slab.append(content(number).digest, SALT, content(number).tokens, bytes_of(number).numpy())
    return slab


def read(slab, place, number, salt=SALT):
    into = bytearray(BLOCK_BYTES)
    good = slab.read(place, content(number).digest, salt, content(number).tokens, into)
    return bytes(into) if good else None


def test_a_block_comes_back_as_it_was_from_the_writers_slab_and_from_anothers(tmp_path):
    slab = written(tmp_path / "a.kv", 1, 2, 3)
    other = Slab.open(tmp_path / "a.kv", SHAPE)
    assert [digest for _, digest in other.scan()] == [content(n).digest for n in (1, 2, 3)]
    for each in (slab, other):
        for place, number in enumerate((1, 2, 3)):
            assert read(each, place, number) == bytes(bytes_of(number))


def test_what_is_written_later_is_seen_by_the_next_scan(tmp_path):
    slab = written(tmp_path / "a.kv", 1)
    other = Slab.open(tmp_path / "a.kv", SHAPE)
    assert len(list(other.scan())) == 1
    assert list(other.scan()) == []  # nothing is new
    slab.append(content(2).digest, SALT, content(2).tokens, bytes_of(2).numpy())
    assert [place for place, _ in other.scan()] == [1]


def test_a_disk_that_takes_a_record_in_parts_gets_all_of_it(tmp_path, monkeypatch):
    whole = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda file, parts, at: whole(file, [parts[0][:7]], at))
    slab = written(tmp_path / "a.kv", 1)
    assert read(slab, 0, 1) == bytes(bytes_of(1))


def test_a_record_that_is_not_all_there_yet_is_found_when_it_is(tmp_path):
    written(tmp_path / "a.kv", 1, 2)
    whole = (tmp_path / "a.kv").read_bytes()
    (tmp_path / "b.kv").write_bytes(whole[:-1])
    slab = Slab.open(tmp_path / "b.kv", SHAPE)
    assert [place for place, _ in slab.scan()] == [0]
    (tmp_path / "b.kv").write_bytes(whole)
    assert [place for place, _ in slab.scan()] == [1]


def test_a_block_is_read_only_by_its_digest_its_tokens_and_its_salt(tmp_path):
    slab = written(tmp_path / "a.kv", 1, 2)
    assert read(slab, 0, 2) is None
    assert read(slab, 0, 1, salt=b"x" * 16) is None
    assert not slab.read(0, content(1).digest, SALT, content(2).tokens, bytearray(BLOCK_BYTES))


def test_a_block_with_fewer_tokens_than_slots_is_told_from_a_full_one(tmp_path):
    slab = Slab.create(tmp_path / "a.kv", SHAPE, 2)
    slab.append(b"d" * 16, SALT, (5, 0), bytes_of(1).numpy())
    into = bytearray(BLOCK_BYTES)
    assert slab.read(0, b"d" * 16, SALT, (5, 0), into)
    assert not slab.read(0, b"d" * 16, SALT, (5, 0, 0, 0), into)


@pytest.mark.parametrize(
    "shape",
    [
        replace(SHAPE, fingerprint="cd" * 16),
        replace(SHAPE, block_bytes=BLOCK_BYTES // 2),
        Shape(SHAPE.fingerprint, BLOCK_BYTES, 8),
    ],
)
def test_a_slab_of_another_model_or_layout_is_not_opened(tmp_path, shape):
    written(tmp_path / "a.kv", 1)
    assert Slab.open(tmp_path / "a.kv", shape) is None


@pytest.mark.parametrize("size", [0, 10, 4095, 4096, 5000])
def test_a_file_that_was_cut_within_its_head_or_a_record_holds_nothing(tmp_path, size):
    written(tmp_path / "a.kv", 1)
    os.truncate(tmp_path / "a.kv", size)
    slab = Slab.open(tmp_path / "a.kv", SHAPE)
    if slab is not None:
        assert all(read(slab, place, 1) is None for place, _ in slab.scan())


def test_no_damage_brings_a_wrong_block(tmp_path):
    written(tmp_path / "a.kv", *range(8))
    whole = (tmp_path / "a.kv").read_bytes()
    rnd = random.Random(0)
    num_lost = 0
    for trial in range(200):
        path = tmp_path / f"{trial}.kv"
        damaged = bytearray(whole)
        for _ in range(rnd.choice((1, 1, 3))):
            damaged[rnd.randrange(len(damaged))] ^= 1 << rnd.randrange(8)
        path.write_bytes(damaged[: rnd.choice((len(damaged), rnd.randrange(len(damaged))))])
        slab = Slab.open(path, SHAPE)
        places = dict(slab.scan()) if slab is not None else {}
        for place, digest in places.items():
            number = int.from_bytes(digest, "big")
            found = read(slab, place, number)
            assert found in (None, bytes(bytes_of(number)))
            num_lost += found is None
        path.unlink()
    assert num_lost > 20


def test_a_slab_counts_with_all_that_it_may_become_while_it_is_written(tmp_path):
    path = tmp_path / "a.kv"
    slab = written(path, 1)
    assert in_use(path)
    assert size_when_full(path) == SHAPE.offset(8) > path.stat().st_size
    slab.seal()
    assert not in_use(path)
    assert size_when_full(path) == path.stat().st_size

"""A folder of slabs: private, bounded, and shared."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time

import pytest

from paged_core import ConfigError
from paged_core.tiers.folder import SlabFolder
from tier_blocks import SHAPE

CAPACITY = 4
SLAB = SHAPE.offset(CAPACITY)


def filled(folder):
    slab = folder.create(SHAPE, CAPACITY)
    for place in range(CAPACITY):
        slab.append(bytes([place + 1] * 16), bytes(16), (1,), bytes(SHAPE.block_bytes))
    slab.seal()
    return slab


def sizes(folder):
    return sum(path.stat().st_size for path in folder.path.glob("*.kv"))


def test_nobody_else_may_look_into_it(tmp_path):
    folder = SlabFolder(str(tmp_path / "new" / "kv"), 1 << 20)
    filled(folder)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()} == {0o600}


def test_an_empty_folder_is_made_private_and_one_with_other_things_is_refused(tmp_path):
    empty, full = tmp_path / "empty", tmp_path / "full"
    for path in (empty, full):
        path.mkdir()
        path.chmod(0o755)
    (full / "letters.txt").write_text("dear")
    SlabFolder(str(empty), 1 << 20)
    assert stat.S_IMODE(empty.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match=r"full\) can be read by others \(mode 755\).*isn't ours"):
        SlabFolder(str(full), 1 << 20)


@pytest.mark.parametrize("what", ["a file", "a damaged key"])
def test_what_cant_be_used_is_told_with_its_path(tmp_path, what):
    path = tmp_path / "kv"
    if what == "a file":
        path.write_text("no folder")
    else:
        SlabFolder(str(path), 1 << 20)
        (path / "key").write_bytes(b"short")
    with pytest.raises(ConfigError, match=str(path)):
        SlabFolder(str(path), 1 << 20)


def test_all_who_share_it_have_one_key(tmp_path):
    assert SlabFolder(str(tmp_path), 1 << 20).key == SlabFolder(str(tmp_path), 1 << 20).key
    assert SlabFolder(str(tmp_path / "b"), 1 << 20).key != SlabFolder(str(tmp_path), 1 << 20).key


def test_it_never_takes_more_than_its_limit_and_gives_up_what_was_of_use_longest_ago(tmp_path):
    folder = SlabFolder(str(tmp_path), 3 * SLAB)
    (tmp_path / "letters.txt").write_text("dear")
    slabs = []
    for age in range(3):
        slabs.append(filled(folder))
        os.utime(slabs[-1].path, (1000 + age, 1000 + age))
    slabs[0].touch()
    slabs.append(filled(folder))
    assert [slab.gone for slab in slabs] == [False, True, False, False]
    for _ in range(5):
        filled(folder)
        assert sizes(folder) <= 3 * SLAB
    assert (tmp_path / "letters.txt").exists()


def test_a_byte_less_than_two_slabs_take_is_room_for_one(tmp_path):
    folder = SlabFolder(str(tmp_path / "growing"), 2 * SLAB - 1)
    growing = folder.create(SHAPE, CAPACITY)
    assert folder.create(SHAPE, CAPACITY) is None
    assert not growing.gone
    folder = SlabFolder(str(tmp_path / "full"), 2 * SLAB - 1)
    first = filled(folder)
    filled(folder)
    assert first.gone
    assert sizes(folder) == SLAB


def test_a_slab_that_is_being_written_is_nobodys_to_delete(tmp_path):
    folder = SlabFolder(str(tmp_path), 2 * SLAB)
    growing = folder.create(SHAPE, CAPACITY)
    os.utime(growing.path, (1, 1))
    filled(folder)
    filled(folder)
    assert not growing.gone
    other = folder.create(SHAPE, CAPACITY)
    assert other is not None
    assert folder.create(SHAPE, CAPACITY) is None, "there is room for two that grow"


def test_what_a_killed_process_was_writing_counts_and_is_given_up(tmp_path):
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from tier_blocks import SHAPE\n"
        "from paged_core.tiers.folder import SlabFolder\n"
        f"slab = SlabFolder(sys.argv[1], {2 * SLAB}).create(SHAPE, {CAPACITY})\n"
        "slab.append(b'x' * 16, bytes(16), (1,), bytes(SHAPE.block_bytes))\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), *sys.path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    folder = SlabFolder(str(tmp_path), 2 * SLAB)
    time.sleep(0.01)
    filled(folder)
    (left,) = [path for path in tmp_path.glob("*.kv") if path.stat().st_size < SLAB]
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(2):
        filled(folder)
    assert not left.exists()
    assert sizes(folder) <= 2 * SLAB


def test_a_limit_without_room_for_two_blocks_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(ConfigError, match=rf"kv_disk_bytes \(5000\).*{SHAPE.offset(1)} bytes each"):
        SlabFolder(str(tmp_path), 5000).slab_capacity(SHAPE)

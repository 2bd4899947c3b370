"""Archives that would do harm to whoever unpacks them are refused, by swap, by serve and by the worker."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from paged_core import ConfigError
from paged_torchserve.opening import _source
from paged_torchserve.server import _model_name
from paged_torchserve.settings import SectionSettings
from torchserve_archives import add_entry, refused, swap


def test_an_encrypted_archive_is_refused(stock, model, tmp_path, capsys):
    old = stock(model)
    encrypt(old)
    assert "encrypted" in refused(capsys, "swap", old, tmp_path / "new.mar")


def encrypt(path: Path) -> None:
    """As far as its entries' flags say."""
    raw = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):  # the table of contents, and each entry's own head
        at = 0
        while (at := raw.find(mark, at)) >= 0:
            raw[at + flags] |= 1
            at += 4
    path.write_bytes(raw)


def test_a_zip_inside_that_is_encrypted_or_broken_is_refused_by_swap_and_by_the_worker(stock, model, tmp_path, capsys):
    packed = tmp_path / "packed"
    packed.mkdir()
    inner = Path(shutil.make_archive(str(packed / "model"), "zip", model))
    encrypt(inner)
    assert "model.zip inside is encrypted" in refused(capsys, "swap", stock(packed), tmp_path / "new.mar")
    with pytest.raises(ConfigError, match=r"model\.zip.*encrypted"):
        _source(packed, SectionSettings(model="model.zip"))
    inner.write_bytes(b"PK no more")
    (tmp_path / "old.mar").unlink()
    assert "can't be read" in refused(capsys, "swap", stock(packed), tmp_path / "new.mar")
    with pytest.raises(ConfigError, match="can't be unpacked"):
        _source(packed, SectionSettings(model="model.zip"))
    assert [path.name for path in packed.iterdir()] == ["model.zip"]


def test_a_zip_inside_is_never_read_whole(stock, model, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    packed.mkdir()
    shutil.make_archive(str(packed / "model"), "zip", model)
    old, new = stock(packed), tmp_path / "new.mar"
    read = zipfile.ZipExtFile.read
    most = 0

    def noted(self: Any, n: int | None = -1) -> bytes:
        nonlocal most
        found = read(self, n)
        if self.name == "model.zip" and (n is None or n < 0):
            most = max(most, len(found))
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "read", noted)
    assert swap(old, new) == 0
    assert 0 < most < (packed / "model.zip").stat().st_size / 4  # its table of contents, from the end


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "org/model", ""])
def test_a_model_whose_name_would_leave_the_store_is_not_served(tmp_path, name):
    folder = tmp_path / "odd"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"modelName": name}}))
    with pytest.raises(ConfigError, match="make a name"):
        _model_name(folder)


def with_a_file_outside(path: Path) -> None:
    add_entry(path, "../../outside")


def with_a_file_at_the_root(path: Path) -> None:
    add_entry(path, "/etc/outside")


def with_a_file_outside_on_windows(path: Path) -> None:
    add_entry(path, "..\\outside")


def with_a_link(path: Path) -> None:
    add_entry(path, "tokenizer.model", b"/etc/passwd", 0o120777)


def with_a_name_twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        add_entry(path, "config.json", b"{}")


def with_too_many_entries(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(20_000):
            archive.writestr(f"f{number}", b"")


def with_a_bomb(path: Path) -> None:
    add_entry(path, "zeros", bytes(100 << 20))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (with_a_file_outside, "written outside its folder"),
        (with_a_file_at_the_root, "written outside its folder"),
        (with_a_file_outside_on_windows, "written outside its folder"),
        (with_a_link, "holds a link"),
        (with_a_name_twice, "twice"),
        (with_too_many_entries, "20000 is the most"),
        (with_a_bomb, "may be made to fill a disk"),
    ],
)
def test_an_archive_that_would_do_harm_when_unpacked_is_refused_by_swap_by_serve_and_inside(
    stock, model, tmp_path, capsys, spoil, told
):
    packed = tmp_path / "packed"
    packed.mkdir()
    inner = Path(shutil.make_archive(str(packed / "model"), "zip", model))
    spoil(inner)
    old, new = stock(packed), tmp_path / "new.mar"
    assert told in refused(capsys, "swap", old, new)
    with pytest.raises(ConfigError, match=told):
        _source(packed, SectionSettings(model="model.zip"))
    assert [path.name for path in packed.iterdir()] == ["model.zip"]
    old.unlink()
    old = stock(model)
    spoil(old)
    assert told in refused(capsys, "swap", old, new)
    with pytest.raises(ConfigError, match=told):
        _model_name(old)
    assert not new.exists()


def test_a_configuration_too_long_to_read_is_refused(stock, model, tmp_path, capsys):
    (model / "config.json").write_bytes(b" " * (17 << 20))
    assert "for a file of its kind" in refused(capsys, "swap", stock(model), tmp_path / "new.mar")


def test_an_archive_that_unpacks_to_more_than_the_disk_has_is_refused_by_the_worker(model, tmp_path, monkeypatch):
    shutil.make_archive(str(tmp_path / "model"), "zip", model)
    shutil.move(model, tmp_path / "elsewhere")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match="has room for 1000; make room"):
        _source(tmp_path, SectionSettings(model="model.zip"))


def test_a_folder_with_a_link_that_leads_out_of_it_is_refused(stock, model, tmp_path, capsys):
    folder = stock(model, archive_format="no-archive")
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    assert "is a link to" in refused(capsys, "swap", folder, tmp_path / "new.mar")

"""Limits of a zip file's table of contents, because an archive may come from anybody and is unpacked onto our disk.
TorchServe unpacks ``.mar`` files itself without these checks.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from paged_core import ConfigError

_MAX_ENTRIES = 20_000
_MAX_TEXT_BYTES = 16 << 20  # of a manifest, a configuration, a config.json: these are read into memory
_SMALL_BYTES, _MAX_RATIO = 64 << 20, 20  # weights hardly shrink; zeros do, a thousand times


def check_contents(archive: zipfile.ZipFile, packed_bytes: int, name: str) -> int:
    """``packed_bytes``: of the whole file, which entries may share among them. Returns what it unpacks to, in bytes.

    Raises:
        ConfigError: it is encrypted; it has too many entries, or two of one name; one is a link, or would lie outside
            the folder that it is unpacked to; or it unpacks to far more than its own size.
    """
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise ConfigError(f"{name} is encrypted; unpack it, and give its folder")
    if len(entries) > _MAX_ENTRIES:
        raise ConfigError(f"{name} has {len(entries)} entries; {_MAX_ENTRIES} is the most. Leave out what isn't needed")
    _check_names(entries, name)
    total = sum(entry.file_size for entry in entries)
    most = _SMALL_BYTES + _MAX_RATIO * packed_bytes
    if total > most:
        raise ConfigError(
            f"{name} has {packed_bytes} bytes and unpacks to {total}; {most} is the most, {_MAX_RATIO} times its own "
            "size and a little: it may be made to fill a disk. If you trust it, unpack it, and give its folder"
        )
    return total


def read_text(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file that is read into memory whole.

    Raises:
        ConfigError: it is too long for that.
        KeyError: there is none of that name.
    """
    size = archive.getinfo(name).file_size
    if size > _MAX_TEXT_BYTES:
        raise ConfigError(f"{name} unpacks to {size} bytes; {_MAX_TEXT_BYTES} is the most for a file of its kind")
    return archive.read(name)


def check_room(folder: Path, num_bytes: int, name: str) -> None:
    """Raises ConfigError unless ``folder`` has room for ``num_bytes`` more."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConfigError(f"{name} unpacks to {num_bytes} bytes, and {folder} has room for {free}; make room")


def check_links(folder: Path, files: Sequence[Path]) -> None:
    """Raises ConfigError if a link among ``files`` leads out of ``folder``, because its target would be packed."""
    root = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise ConfigError(
                f"{file} is a link to {file.resolve()}, outside {folder}; copy what is meant, or say --follow-links"
            )


def _check_names(entries: Sequence[zipfile.ZipInfo], name: str) -> None:
    seen: set[str] = set()
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]):
            raise ConfigError(f"{name} holds {entry.filename!r}, which would be written outside its folder")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ConfigError(f"{name} holds a link, {entry.filename!r}; pack the file that it stands for")
        if str(path) in seen:
            raise ConfigError(f"{name} holds {entry.filename!r} twice: which of them counts is anybody's guess")
        seen.add(str(path))

"""Writes archives, as a file or as a folder. Existing files are copied unchanged, never packed again."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from paged_core import ConfigError


def check_target(new: Path, force: bool, *, as_folder: bool) -> None:
    """Raises ConfigError unless an archive can be written to ``new``."""
    if not as_folder and new.suffix != ".mar":
        raise ConfigError(
            f"{new} must end in .mar: TorchServe takes no other name for an archive; for a folder say "
            "--archive-format no-archive"
        )
    if new.exists() and not force:
        raise ConfigError(f"{new} is there already; say --force to write over it")
    if as_folder and new.exists() and not (new / "MAR-INF").is_dir():
        raise ConfigError(f"{new} is no archive's folder: it is not written over")
    if not new.resolve().parent.is_dir():
        raise ConfigError(f"{new.parent} is no folder")


@contextmanager
def target(new: Path) -> Iterator[Path]:
    """A temporary path, which is renamed to ``new`` on success."""
    unfinished = new.with_name(f".{new.name}.{os.getpid()}")
    try:
        yield unfinished
        if new.is_dir():
            shutil.rmtree(new)
        unfinished.replace(new)
    finally:
        _remove(unfinished)


def write(path: Path, files: Iterable[tuple[str, Path]], made: Mapping[str, bytes], *, as_folder: bool) -> None:
    """An archive of ``files``, (name inside, where it is), and of what is ``made`` here."""
    if as_folder:
        for name, content in made.items():
            place = path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        for name, file in files:
            _place(file, path / name)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for name, content in made.items():
            archive.writestr(name, content)
        for name, file in files:
            archive.write(file, name)


def replace(path: Path, changed: Mapping[str, bytes]) -> None:
    """New entries at the end, and a table of contents without the old ones: all other bytes stay where they are.
    Unpacking the file from front to end overwrites the old entries by the new ones."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, content in changed.items():
            old = archive.NameToInfo.pop(name, None)
            if old is not None:
                archive.filelist.remove(old)
            archive.writestr(name, content)


def unpack(path: Path, folder: Path, changed: Mapping[str, bytes]) -> None:
    """The zip file at ``path`` (looked through before) as a folder."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    write(folder, (), changed, as_folder=True)


def _place(file: Path, place: Path) -> None:
    """A hard link, if the disk supports it, so that large weights take no extra space; else a copy."""
    place.parent.mkdir(parents=True, exist_ok=True)
    source = file.resolve()
    try:
        place.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, place)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()

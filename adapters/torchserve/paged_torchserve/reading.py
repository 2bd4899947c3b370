"""Reads an existing archive: its files, its manifest, its configuration, and its handler's settings."""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from paged_core import ConfigError
from paged_torchserve.contents import check_contents, check_links, read_text

MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"
_SETUP = "setup_config.json"  # what older handlers went by


class Opened(NamedTuple):
    names: list[str]
    read: Callable[[str], bytes]
    open: Callable[[str], IO[bytes]]


class Old(NamedTuple):
    """The contents of an archive."""

    manifest: dict[str, Any]
    config_name: str
    config: dict[str, Any]  # empty if there is none
    setup: dict[str, Any]  # setup_config.json; empty if there is none
    handler: str  # its name, and its source if that is inside

    @property
    def handler_section(self) -> Mapping[str, Any]:
        section = self.config.get("handler")
        return section if isinstance(section, dict) else {}

    @property
    def model_path(self) -> str | None:
        """Where the old handler looked for its model."""
        engine = self.handler_section.get("vllm_engine_config")
        named = [self.handler_section.get(name) for name in ("model_path", "base_model_path")]
        named.append(engine.get("model") if isinstance(engine, dict) else None)
        found = next((name for name in named if isinstance(name, str) and name), None)
        found = None if found is None else os.path.normpath(found)
        return None if found == "." else found


@contextmanager
def opened(path: Path, *, follow_links: bool = False) -> Iterator[Opened]:
    """The archive at ``path``, a file or a folder.

    Raises:
        ConfigError: it can't be used.
    """
    if path.is_dir():
        files = {each.relative_to(path).as_posix(): each for each in files_in(path)}
        if not follow_links:
            check_links(path, list(files.values()))
        yield Opened(list(files), lambda name: files[name].read_bytes(), lambda name: files[name].open("rb"))
        return
    if not path.is_file():
        raise ConfigError(f"{path} doesn't exist")
    if not zipfile.is_zipfile(path):
        hint = "; unpack it and give its folder" if tarfile.is_tarfile(path) else ""
        raise ConfigError(f"{path} is no zip file, as archives are{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_contents(archive, path.stat().st_size, str(path))
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            yield Opened(names, partial(read_text, archive), archive.open)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error


def files_in(folder: Path) -> list[Path]:
    """All files under ``folder``, in order. Linked folders are followed, each once. A hub's cache keeps files under
    ``blobs`` and links to them under ``snapshots``: of these the links alone are taken."""
    found: list[Path] = []
    seen: set[Path] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        here = Path(at)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        if {"blobs", "snapshots"} <= set(folders):
            folders.remove("blobs")
        found += [here / name for name in names if (here / name).is_file()]
    return sorted(found)


def read_old(path: Path, archive: Opened) -> Old:
    """
    Raises:
        ConfigError: it is no archive, or what it says can't be read.
    """
    import yaml

    if MANIFEST not in archive.names:
        raise ConfigError(f"{path} has no {MANIFEST}: it is no TorchServe archive")
    try:
        manifest = json.loads(archive.read(MANIFEST))
        name = manifest["model"].get("configFile") or CONFIG
        config = yaml.safe_load(archive.read(name)) if name in archive.names else {}
        setup = json.loads(archive.read(_SETUP)) if _SETUP in archive.names else {}
        handler = str(manifest["model"].get("handler") or "")
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} has a manifest or a configuration that can't be read: {error!r}") from error
    if config is not None and not isinstance(config, dict):
        raise ConfigError(f"{path}: {name} holds no keys and values")
    source = handler.partition(":")[0]
    source = source if source in archive.names else f"{source}.py"
    told = archive.read(source).decode(errors="replace") if source in archive.names else ""
    return Old(manifest, name, config or {}, setup if isinstance(setup, dict) else {}, f"{handler}\n{told}")

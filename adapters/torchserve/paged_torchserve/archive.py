"""Archives: ours from another's, or from a model's folder. Weights are neither read nor packed anew.

An archive is a zip file, or a folder, with a manifest (which handler), a model-config.yaml (how TorchServe and the
handler are to run) and the model's files.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from paged_core import ConfigError
from paged_torchserve.contents import check_contents, check_links, read_text
from paged_torchserve.models import PICKLES, check_weights, find_model
from paged_torchserve.settings import SECTION, put, read_settings

HANDLER = "paged_torchserve.handler"
MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG = "model-config.yaml"
_OTHER_FORMATS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".ot")  # of the same weights
# A delay of 0 lets TorchServe hand over only one new request a step; with 1 ms it hands over all that wait.
_OURS = {"minWorkers": 1, "maxWorkers": 1, "maxBatchDelay": 1, "continuousBatching": True}
_BATCH_SIZE = 64
_STARTUP_S = 600  # of TorchServe's own 120 the first start alone may take more: it compiles kernels
_NOT_WITH_US = ("asyncCommunication", "sequenceBatching", "useJobTicket", "torchrun", "pippy", "deepspeed", "tp",
                "micro_batching")  # fmt: skip

# Rights that whoever made the old archive had given to what came with the weights: they are given anew, or not at all.
_RIGHTS = ("allow_pickle", "trust_remote_code")

_Pairs = Sequence[tuple[str, str]]


class _Opened(NamedTuple):
    names: list[str]
    read: Callable[[str], bytes]
    open: Callable[[str], IO[bytes]]


def swap(old: Path, new: Path, settings: _Pairs, *, allow_pickle: bool = False, force: bool = False) -> list[str]:
    """Write ``new``: ``old`` with our handler and a configuration for it. Returns what is different.

    Rights that ``old`` gives to what comes with its weights are not kept: ``settings`` or ``allow_pickle`` give them.

    Raises:
        ConfigError: ``old`` can't be used, a setting is wrong, or ``new`` is there already.
    """
    _check_target(new, force)
    with _opened(old) as archive:
        manifest, config_name, config = _read(old, archive)
        model = _find(archive, _hint(config, settings), allow_pickle)
        fresh_config = _config(config, model, settings, allow_pickle)
        fresh_manifest = _manifest(manifest, config_name)
        changed = {MANIFEST: _json(fresh_manifest), config_name: _yaml(fresh_config)}
        with _target(new) as unfinished:
            if old.is_dir():
                _pack(unfinished, ((name, old / name) for name in archive.names if name not in changed), changed)
            else:
                shutil.copyfile(old, unfinished)
                _replace(unfinished, changed)
    found = [*_differences("", manifest["model"], fresh_manifest["model"]), *_differences("", config, fresh_config)]
    return [*found, *_told_rights(config, fresh_config)]


def create(
    model: str, new: Path, name: str, version: str, settings: _Pairs, *, allow_pickle: bool = False, force: bool = False
) -> None:
    """Write ``new``: an archive of ``model``, a folder or a GGUF file; of a hub id, one that loads it.

    Raises:
        ConfigError: as ``swap``.
    """
    _check_target(new, force)
    path = Path(model)
    files: dict[str, Path] = {}
    inside = None
    if path.is_dir():
        files = {each.relative_to(path).as_posix(): each for each in sorted(path.rglob("*")) if each.is_file()}
        files = {name: each for name, each in files.items() if not name.startswith(".") and "/." not in name}
        found = find_model(files, lambda name: files[name].read_bytes(), ".")
        check_weights(found, allow_pickle)
        if found.has_safetensors:
            files = {name: each for name, each in files.items() if each.suffix not in _OTHER_FORMATS}
    elif path.is_file() and path.suffix == ".gguf":
        files, inside = {path.name: path}, path.name
    elif path.exists() or model.startswith((".", "/", "~")):
        raise ConfigError(f"{model} is neither a model's folder nor a GGUF file")
    else:
        inside = model  # a hub id
    config = _config({}, inside, settings, allow_pickle)
    manifest = _manifest({"model": {"modelName": name, "modelVersion": version}, "runtime": "python"}, CONFIG)
    with _target(new) as unfinished:
        _pack(unfinished, files.items(), {MANIFEST: _json(manifest), CONFIG: _yaml(config)})


# ---- reading ---------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    if path.is_dir():
        files = [each for each in sorted(path.rglob("*")) if each.is_file()]
        check_links(path, files)
        names = [each.relative_to(path).as_posix() for each in files]
        yield _Opened(names, lambda name: (path / name).read_bytes(), lambda name: (path / name).open("rb"))
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
            yield _Opened(names, partial(read_text, archive), archive.open)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error


def _read(path: Path, archive: _Opened) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Its manifest; the name of its configuration; and that, empty if there is none."""
    import yaml

    if MANIFEST not in archive.names:
        raise ConfigError(f"{path} has no {MANIFEST}: it is no TorchServe archive")
    try:
        manifest = json.loads(archive.read(MANIFEST))
        name = manifest["model"].get("configFile") or CONFIG
        config = yaml.safe_load(archive.read(name)) if name in archive.names else {}
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} has a manifest or a configuration that can't be read: {error!r}") from error
    if config is not None and not isinstance(config, dict):
        raise ConfigError(f"{path}: {name} holds no keys and values")
    return manifest, name, config or {}


def _hint(config: Mapping[str, Any], settings: _Pairs) -> str | None:
    """Where the model is, if it has been said: now, at an earlier swap, or to the old handler."""
    named: dict[str, Any] = {}
    for key, text in settings:
        if key == "model":
            put(named, key, text)
    sections = [named.get(SECTION), config.get(SECTION)]
    found = [section["model"] for section in sections if isinstance(section, dict) and section.get("model")]
    return found[0] if found else None


def _find(archive: _Opened, hint: str | None, allow_pickle: bool) -> str | None:
    """The model inside as ``settings.model`` names it; None: at the top."""
    if hint is not None and not any(name == hint or name.startswith(f"{hint}/") for name in archive.names):
        return hint  # a hub id, or a folder of the machine that serves
    packed = [name for name in archive.names if name.endswith(".zip") and hint in (None, name)]
    try:
        found = find_model(archive.names, archive.read, hint)
    except ConfigError:
        for name in packed:
            with archive.open(name) as file, zipfile.ZipFile(file) as inner:  # which may be far larger than memory
                check_contents(inner, file.seek(0, os.SEEK_END), f"{name} inside")
                check_weights(find_model(inner.namelist(), partial(read_text, inner)), allow_pickle)
                return name
        raise
    check_weights(found, allow_pickle)
    return None if found.folder == "." else found.folder


# ---- what is new -----------------------------------------------------------------------------------------------


def _config(old: Mapping[str, Any], model: str | None, settings: _Pairs, allow_pickle: bool) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if key not in _NOT_WITH_US}
    if kept.get("parallelType", "custom") != "custom":
        del kept["parallelType"]
    size = old.get("batchSize")
    config: dict[str, Any] = {
        "startupTimeout": _STARTUP_S,
        **kept,
        **_OURS,
        "batchSize": max(_BATCH_SIZE, size if isinstance(size, int) else 1),
    }
    section = {key: value for key, value in _section(old).items() if key not in _RIGHTS}
    theirs = old.get("handler")
    if isinstance(theirs, dict) and isinstance(theirs.get("max_new_tokens"), int):
        section.setdefault("max_new_tokens", theirs["max_new_tokens"])
    if model is not None:
        section["model"] = model
    if allow_pickle:
        section["allow_pickle"] = True
    config.pop(SECTION, None)
    if section:
        config[SECTION] = section
    for key, text in settings:
        put(config, key, text)
    read_settings(config)
    return config


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get(SECTION) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} in model-config.yaml must hold keys and values; it is {section!r}")
    return section


def _manifest(old: Mapping[str, Any], config_name: str) -> dict[str, Any]:
    model = {key: value for key, value in old["model"].items() if key != "envelope"}
    return {**old, "model": {**model, "handler": HANDLER, "configFile": config_name}}


def _differences(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(after, dict):
            found += _differences(f"{path}{key}.", before if isinstance(before, dict) else {}, after)
        elif key not in new:
            found.append(f"{path}{key}: {before} is gone")
        elif before != after:
            found.append(f"{path}{key}: {after}" + (f" (was {before})" if key in old else ""))
    return found


def _told_rights(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    told = []
    for key in _RIGHTS:
        if _section(new).get(key):
            told.append(f"{SECTION}.{key} is on: what comes with the weights can run any code")
        elif _section(old).get(key):
            told.append(f"{SECTION}.{key} was on, and is off; --set {key}=true gives it anew, if you trust the weights")
    return told


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _yaml(value: Any) -> bytes:
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text.encode()


# ---- writing ---------------------------------------------------------------------------------------------------


def _check_target(new: Path, force: bool) -> None:
    if new.suffix != ".mar":
        raise ConfigError(f"{new} must end in .mar: TorchServe takes no other name for an archive")
    if new.exists() and not force:
        raise ConfigError(f"{new} is there already; say --force to write over it")
    if not new.resolve().parent.is_dir():
        raise ConfigError(f"{new.parent} is no folder")


@contextmanager
def _target(new: Path) -> Iterator[Path]:
    """A file that becomes ``new`` when all has gone well."""
    unfinished = new.with_name(f".{new.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(new)
    finally:
        unfinished.unlink(missing_ok=True)


def _pack(path: Path, files: Iterable[tuple[str, Path]], made: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for name, content in made.items():
            archive.writestr(name, content)
        for name, file in files:
            archive.write(file, name)


def _replace(path: Path, changed: Mapping[str, bytes]) -> None:
    """New entries at the end, and a table of contents without the old ones: all other bytes stay where they are. Who
    unpacks the file from front to end writes the new ones over the old."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, content in changed.items():
            old = archive.NameToInfo.pop(name, None)
            if old is not None:
                archive.filelist.remove(old)
            archive.writestr(name, content)

"""Archives: ours from another's, or from a model's folder. Weights are neither read nor packed anew.

An archive is a zip file, or a folder, with a manifest (which handler), a model-config.yaml (how TorchServe and the
handler are to run) and the model's files.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paged_core import ConfigError
from paged_torchserve.configuration import changes, configuration, option, told_rights
from paged_torchserve.contents import check_contents, read_text
from paged_torchserve.families import family_of
from paged_torchserve.models import (
    PICKLES,
    WEIGHTS,
    FoundModel,
    NoModel,
    SeveralModels,
    check_tokenizer,
    check_weights,
    find_model,
)
from paged_torchserve.packing import check_target, replace, target, unpack, write
from paged_torchserve.reading import CONFIG, MANIFEST, Old, Opened, files_in, opened, read_old
from paged_torchserve.settings import SECTION
from paged_torchserve.translation import Translated, translate

HANDLER = "paged_torchserve.handler"
_OTHER_FORMATS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".ot")  # of the same weights

_Pairs = Sequence[tuple[str, str]]


def swap(
    old: Path,
    new: Path,
    settings: _Pairs,
    *,
    allow_pickle: bool = False,
    force: bool = False,
    as_folder: bool = False,
    follow_links: bool = False,
) -> list[str]:
    """Write ``new``: ``old`` with our handler and a configuration for it. Returns the changes, and the old settings
    without a meaning. Permissions that ``old`` gives to code that comes with its weights are not kept; ``settings`` or
    ``allow_pickle`` grant them again.

    Raises:
        ConfigError: ``old`` can't be used, a setting is wrong, or ``new`` is there already.
    """
    check_target(new, force, as_folder=as_folder)
    with opened(old, follow_links=follow_links) as archive:
        theirs = read_old(old, archive)
        family = family_of(theirs.handler)
        translated = translate(theirs.handler_section, theirs.setup, family)
        model = _find(archive, theirs, settings, allow_pickle)
        config = configuration(theirs.config, model, translated.section, settings, allow_pickle)
        manifest = _manifest(theirs.manifest, theirs.config_name)
        changed = {MANIFEST: _json(manifest), theirs.config_name: _yaml(config)}
        with target(new) as unfinished:
            _write(unfinished, old, archive, changed, as_folder)
    found = [*changes(theirs.manifest["model"], manifest["model"]), *changes(theirs.config, config)]
    kind = [f"the old handler is one of pytorch/serve's: examples/{family.name}"] if family is not None else []
    return [*kind, *found, *told_rights(theirs.config, config), *_told_ignored(translated)]


def create(
    model: str,
    new: Path,
    name: str,
    version: str,
    settings: _Pairs,
    *,
    allow_pickle: bool = False,
    force: bool = False,
    as_folder: bool = False,
) -> None:
    """Write ``new``: an archive of ``model``, a folder or a GGUF file; for a hub id, an archive that loads it.

    Raises:
        ConfigError: as ``swap``.
    """
    check_target(new, force, as_folder=as_folder)
    files, inside = _model_files(model, settings, allow_pickle)
    config = configuration({}, inside, {}, settings, allow_pickle)
    manifest = _manifest({"model": {"modelName": name, "modelVersion": version}, "runtime": "python"}, CONFIG)
    with target(new) as unfinished:
        write(unfinished, files.items(), {MANIFEST: _json(manifest), CONFIG: _yaml(config)}, as_folder=as_folder)


def _model_files(model: str, settings: _Pairs, allow_pickle: bool) -> tuple[dict[str, Path], str | None]:
    """(name inside -> where it is, the model as ``settings.model`` names it)"""
    path = Path(model)
    if path.is_dir():
        files = {each.relative_to(path).as_posix(): each for each in files_in(path)}
        files = {name: each for name, each in files.items() if not name.startswith(".") and "/." not in name}
        found = find_model(files, lambda name: files[name].read_bytes(), ".")
        _check(found, list(files), settings, allow_pickle)
        if found.has_safetensors:
            files = {name: each for name, each in files.items() if each.suffix not in _OTHER_FORMATS}
        return files, None
    if path.is_file() and path.suffix == ".gguf":
        return {path.name: path}, path.name
    if path.exists() or model.startswith((".", "/", "~")):
        raise ConfigError(f"{model} is neither a model's folder nor a GGUF file")
    return {}, model  # a hub id


def _find(archive: Opened, old: Old, settings: _Pairs, allow_pickle: bool) -> str | None:
    """The model as ``settings.model`` names it; None: at the top."""
    section = old.config.get(SECTION)
    said = option(settings, "model") or (section.get("model") if isinstance(section, dict) else None)
    if said is not None:
        return _inside(archive, said, settings, allow_pickle) if _has(archive, said) else str(said)
    path = old.model_path
    try:
        return _inside(archive, None, settings, allow_pickle)
    except NoModel:
        if path is None or any(name.endswith((*WEIGHTS, *PICKLES)) for name in archive.names):
            raise
        return path  # of the machine that serves, or a hub id
    except SeveralModels:
        if path is None or not _has(archive, path):
            raise
        return _inside(archive, path, settings, allow_pickle)


def _has(archive: Opened, name: str) -> bool:
    return any(each == name or each.startswith(f"{name}/") for each in archive.names)


def _inside(archive: Opened, hint: str | None, settings: _Pairs, allow_pickle: bool) -> str | None:
    if hint is not None and hint.endswith(".gguf"):
        return hint
    try:
        found = find_model(archive.names, archive.read, hint)
    except NoModel:
        other = _packed_model(archive, hint, settings, allow_pickle) or _gguf(archive, hint)
        if other is None:
            raise
        return other
    _check(found, archive.names, settings, allow_pickle)
    return None if found.folder == "." else found.folder


def _packed_model(archive: Opened, hint: str | None, settings: _Pairs, allow_pickle: bool) -> str | None:
    """The first zip file inside, which must hold a model."""
    for name in (name for name in archive.names if name.endswith(".zip") and hint in (None, name)):
        with archive.open(name) as file, zipfile.ZipFile(file) as inner:  # which may be far larger than memory
            check_contents(inner, file.seek(0, os.SEEK_END), f"{name} inside")
            found = find_model(inner.namelist(), partial(read_text, inner))
            _check(found, inner.namelist(), settings, allow_pickle)
            return name
    return None


def _gguf(archive: Opened, hint: str | None) -> str | None:
    files = [name for name in archive.names if name.endswith(".gguf") and name.startswith(f"{hint or ''}")]
    if len(files) > 1:
        raise SeveralModels(f"there are several models inside ({', '.join(files)}); say which: --set model=FILE")
    return files[0] if files else None


def _check(found: FoundModel, names: Sequence[str], settings: _Pairs, allow_pickle: bool) -> None:
    check_weights(found, allow_pickle)
    if option(settings, "tokenizer") is None:
        check_tokenizer(found, names)


def _write(path: Path, old: Path, archive: Opened, changed: Mapping[str, bytes], as_folder: bool) -> None:
    if old.is_dir():
        files = ((name, old / name) for name in archive.names if name not in changed)
        write(path, files, changed, as_folder=as_folder)
    elif as_folder:
        unpack(old, path, changed)
    else:
        shutil.copyfile(old, path)
        replace(path, changed)


def _manifest(old: Mapping[str, Any], config_name: str) -> dict[str, Any]:
    model = {key: value for key, value in old["model"].items() if key != "envelope"}
    return {**old, "model": {**model, "handler": HANDLER, "configFile": config_name}}


def _told_ignored(translated: Translated) -> list[str]:
    return [f"without a meaning here: {each}" for each in translated.ignored]


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _yaml(value: Any) -> bytes:
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text.encode()

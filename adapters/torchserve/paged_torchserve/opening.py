"""From an unpacked archive to engines: the model and the devices."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paged_core import AsyncEngine, ConfigError, Engine
from paged_torchserve.contents import check_contents, check_room
from paged_torchserve.models import check_weights, find_model
from paged_torchserve.reading import files_in
from paged_torchserve.settings import SectionSettings


def open_engines(
    model_dir: Path, devices: Sequence[str], settings: SectionSettings, plugins: Sequence[Sequence[Any]]
) -> list[AsyncEngine]:
    """One on each of ``devices``, with its ``plugins``.

    Raises:
        ConfigError: there is no model, or it can't be loaded as the settings say.
        UnsupportedModel: it can't run on paged memory.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "this worker is one of several that torchrun started (parallelType: tp, say), and the engine starts its "
            "ranks itself: set parallelType: custom and, in the section paged, tensor_parallel_size to their number; "
            "or device: auto, to spread layers over GPUs"
        )
    source, tokenizer = _source(model_dir, settings), _tokenizer(model_dir, settings)
    engines = [
        AsyncEngine(_engine(source, device, settings, each), tokenizer=tokenizer)
        for device, each in zip(devices, plugins, strict=True)
    ]
    if engines[0].codec.tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer, so that no text could be served; say which: --set tokenizer=...")
    return engines


def _engine(source: str, device: str, settings: SectionSettings, plugins: Sequence[Any]) -> Engine:
    if (settings.allow_pickle or settings.trust_remote_code) and not source.endswith(".gguf"):
        return Engine(_load(source, device, settings), settings.engine, plugins=plugins)
    return Engine(source, settings.engine, plugins=plugins, device=device, dtype=settings.dtype)


def _tokenizer(model_dir: Path, settings: SectionSettings) -> Any:
    """The one that the settings name; None: the model's own."""
    named = settings.tokenizer
    if named is None:
        return None
    from transformers import AutoTokenizer

    folder = model_dir / named
    source = str(folder) if folder.is_dir() else named
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # a broken one raises a plain Exception
        raise ConfigError(f"tokenizer {named} can't be loaded: {error}") from error


def _source(model_dir: Path, settings: SectionSettings) -> str:
    """The model's folder, or a hub id."""
    named = settings.model
    folder = model_dir / (named or ".")
    exact: str | None = None if named is None else "."  # where in it the model is
    if named is not None:
        if folder.suffix == ".zip" and folder.is_file():
            folder, exact = _unzip(folder), None
        elif folder.is_file():  # GGUF
            return str(folder)
        elif not folder.is_dir():
            return named
    names = [path.relative_to(folder).as_posix() for path in files_in(folder)]
    found = find_model(names, lambda name: (folder / name).read_bytes(), exact)
    check_weights(found, settings.allow_pickle)
    return str(folder / found.folder)


def _unzip(archive: Path) -> Path:
    """Its contents beside it."""
    folder = archive.with_suffix("")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            try:
                with zipfile.ZipFile(archive) as opened:
                    num_bytes = check_contents(opened, archive.stat().st_size, f"{archive.name} in the archive")
                    check_room(folder.parent, num_bytes, archive.name)
                    opened.extractall(Path(unfinished) / "model")
            except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
                raise ConfigError(f"{archive.name} in the archive can't be unpacked: {error}") from error
            (Path(unfinished) / "model").rename(folder)
    return folder


def _load(source: str, device: str, settings: SectionSettings) -> Any:
    """Load by transformers directly: what the core's hook refuses, but the archive's owner has allowed."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = "auto" if settings.dtype is None else getattr(torch, settings.dtype)
    placed = {} if device == "cpu" else {"device_map": device}
    safe = None if settings.allow_pickle else True  # None: as it comes
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=safe, **placed
    ).eval()

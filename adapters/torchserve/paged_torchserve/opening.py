"""From an unpacked archive to an engine: which model, on which device."""

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
from paged_torchserve.settings import Settings


def open_engine(model_dir: Path, gpu_id: int | None, settings: Settings, plugins: Sequence[Any]) -> AsyncEngine:
    """
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
    device, source = _device(gpu_id, settings), _source(model_dir, settings)
    if (settings.allow_pickle or settings.trust_remote_code) and not source.endswith(".gguf"):
        source = _load(source, device, settings)
        return AsyncEngine(Engine(source, settings.engine, plugins=plugins))
    return AsyncEngine(Engine(source, settings.engine, plugins=plugins, device=device, dtype=settings.dtype))


def _device(gpu_id: int | None, settings: Settings) -> str:
    """The GPU that TorchServe has given to this worker, unless the settings say otherwise."""
    if settings.device is not None:
        return settings.device
    if settings.engine.tensor_parallel_size > 1:
        return "auto"  # each rank takes one
    return "cpu" if gpu_id is None else f"cuda:{gpu_id}"


def _source(model_dir: Path, settings: Settings) -> str:
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
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
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


def _load(source: str, device: str, settings: Settings) -> Any:
    """By transformers directly: what the core's hook refuses, and the owner of the archive has allowed."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = "auto" if settings.dtype is None else getattr(torch, settings.dtype)
    placed = {} if device == "cpu" else {"device_map": device}
    safe = None if settings.allow_pickle else True  # None: as it comes
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=safe, **placed
    ).eval()

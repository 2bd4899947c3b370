"""Where in an archive the Hugging Face model is. Knows names of files and what a config.json says; loads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from paged_core import ConfigError

WEIGHTS = (".safetensors",)
_NO_TEXT = ("Classification", "QuestionAnswering", "MaskedLM", "NextSentencePrediction", "MultipleChoice")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Found(NamedTuple):
    """A model's folder among the files of an archive."""

    folder: str  # "." at the top
    has_safetensors: bool
    pickles: list[str]  # names of weights that are pickles


def find_model(names: Iterable[str], read: Callable[[str], bytes], hint: str | None = None) -> Found:
    """The model among files called ``names``; ``hint``: its folder, where that is known.

    Raises:
        ConfigError: there is none, or more than one.
    """
    names = list(names)
    folders = [str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "config.json"]
    if hint is not None:
        folders = [folder for folder in folders if folder == str(PurePosixPath(hint))]
    kinds = {folder: _kinds(read(_join(folder, "config.json"))) for folder in folders}
    folders = [folder for folder in folders if kinds[folder] is not None]
    if not folders:
        where = f" in {hint}" if hint is not None else ""
        raise ConfigError(f"there is no Hugging Face model{where} inside: no config.json that names a model_type")
    if len(folders) > 1:
        told = ", ".join(folders)
        raise ConfigError(f"there are several models inside ({told}); say which: --set model=FOLDER")
    (folder,) = folders
    kind = next((kind for kind in kinds[folder] or () if kind.endswith(_NO_TEXT)), None)
    if kind is not None:
        raise ConfigError(f"the model inside is a {kind}, which writes no text; only causal language models are served")
    inside = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == folder]
    safe = any(path.suffix in WEIGHTS for path in inside)
    return Found(folder, safe, sorted(str(path) for path in inside if path.suffix in PICKLES))


def check_weights(found: Found, allow_pickle: bool) -> None:
    """Raises ConfigError unless the weights are there, and safe to read or allowed."""
    if found.has_safetensors:
        return
    if not found.pickles:
        raise ConfigError(f"there are no weights beside {_join(found.folder, 'config.json')} (no *.safetensors)")
    if not allow_pickle:
        raise ConfigError(
            f"the weights are pickles ({found.pickles[0]}), which can run any code when they are read; convert them "
            "to safetensors, or say --allow-pickle if you trust them"
        )


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _kinds(config: bytes) -> list[str] | None:
    """The classes that a model's config.json names; None if it isn't one."""
    try:
        value = json.loads(config)
    except ValueError:
        return None
    if not isinstance(value, dict) or "model_type" not in value:
        return None
    return [str(kind) for kind in value.get("architectures") or ()]

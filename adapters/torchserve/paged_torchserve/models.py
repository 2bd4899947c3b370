"""Finds the Hugging Face model in an archive. Knows names of files and the contents of config.json; loads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from paged_core import ConfigError

WEIGHTS = (".safetensors",)
_NO_TEXT = ("Classification", "QuestionAnswering", "MaskedLM", "NextSentencePrediction", "MultipleChoice")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_ADAPTER = "adapter_config.json"  # peft's
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class NoModel(ConfigError):
    """There is no model at the searched place."""


class SeveralModels(ConfigError):
    """There are several models, and no setting chooses one."""


class FoundModel(NamedTuple):
    """A model's folder among the files of an archive."""

    folder: str  # "." at the top
    has_safetensors: bool
    pickles: list[str]  # names of weights that are pickles


def find_model(names: Iterable[str], read: Callable[[str], bytes], hint: str | None = None) -> FoundModel:
    """The model among files called ``names``; ``hint``: its folder, where that is known.

    Raises:
        NoModel: there is none.
        SeveralModels: there are more.
        ConfigError: it does not generate text, or is an adapter.
    """
    names = list(names)
    adapters = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == _ADAPTER}
    folders = [str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "config.json"]
    if hint is not None:
        folders = [folder for folder in folders if folder == str(PurePosixPath(hint))]
    configs = {folder: _model_config(read(_join(folder, "config.json"))) for folder in folders}
    folders = [folder for folder in folders if configs[folder] is not None]
    if not folders:
        _check_no_adapter(next(iter(sorted(adapters)), None))
        where = f" in {hint}" if hint is not None else ""
        raise NoModel(f"there is no Hugging Face model{where} inside: no config.json that names a model_type")
    if len(folders) > 1:
        told = ", ".join(folders)
        raise SeveralModels(f"there are several models inside ({told}); say which: --set model=FOLDER")
    (folder,) = folders
    _check_no_adapter(folder if folder in adapters else None)
    _check_kind(configs[folder] or {})
    inside = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == folder]
    safe = any(path.suffix in WEIGHTS for path in inside)
    return FoundModel(folder, safe, sorted(str(path) for path in inside if path.suffix in PICKLES))


def check_weights(found: FoundModel, allow_pickle: bool) -> None:
    """Raises ConfigError unless the weights exist, and are safe to read or allowed."""
    if found.has_safetensors:
        return
    if not found.pickles:
        raise ConfigError(f"there are no weights beside {_join(found.folder, 'config.json')} (no *.safetensors)")
    if not allow_pickle:
        raise ConfigError(
            f"the weights are pickles ({found.pickles[0]}), which can run any code when they are read; convert them "
            "to safetensors, or say --allow-pickle if you trust them"
        )


def check_tokenizer(found: FoundModel, names: Iterable[str]) -> None:
    """Raises ConfigError unless, among files called ``names``, there is a tokenizer in the model's folder."""
    beside = {PurePosixPath(name).name for name in names if str(PurePosixPath(name).parent) == found.folder}
    if not beside.intersection(_TOKENIZERS) and not any(name.endswith(".tiktoken") for name in beside):
        raise ConfigError(
            f"there is no tokenizer beside {_join(found.folder, 'config.json')}, so that no text could be served; say "
            "which: --set tokenizer=FOLDER (inside, or of the machine that serves) or a hub id"
        )


def _check_no_adapter(folder: str | None) -> None:
    """Raises ConfigError if there is an adapter, because the model would be another one without it."""
    if folder is not None:
        raise ConfigError(
            f"{_join(folder, _ADAPTER)} makes a LoRA adapter of this, and there are none here yet: merge it into the "
            "weights (peft's merge_and_unload) and save the model that comes out; or leave the file out"
        )


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _model_config(config: bytes) -> dict[str, Any] | None:
    """What a config.json says; None if it isn't a model's."""
    try:
        value = json.loads(config)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "model_type" in value else None


def _check_kind(config: Mapping[str, Any]) -> None:
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    silent = next((kind for kind in kinds if kind.endswith(_NO_TEXT)), None)
    if silent is not None:
        raise ConfigError(
            f"the model inside is a {silent}, which writes no text; only causal language models are served"
        )
    if config.get("is_encoder_decoder"):
        kind = kinds[0] if kinds else config["model_type"]
        raise ConfigError(
            f"the model inside is a {kind}, with an encoder beside its decoder; only causal language models are served"
        )

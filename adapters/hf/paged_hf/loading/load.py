"""From what a user names to a model and its tokenizer: a live object, a folder, a hub id, a GGUF file, "smollm2".

Code that comes with the weights never runs unless the caller asks for it: pickled weights and a repository's own code
are refused by default.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_core import ConfigError, Ranks, UnsupportedModel
from paged_hf.loading import embedded
from paged_hf.loading.split import load_shard
from paged_hf.model.paged_model import HFPagedModel
from paged_hf.model.split_model import SplitPagedModel

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = ("float32", "bfloat16", "float16")
_UNREADABLE = (OSError, ValueError, SafetensorError, struct.error)  # the last two: a truncated or invalid file
_log = logging.getLogger("paged_hf")


def load_model(
    source: Any,
    device: str | None = None,
    dtype: str | None = None,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    ranks: Ranks | None = None,
) -> HFPagedModel | None:
    """The model that ``source`` names, or this rank's shard of it; None if ``source`` is not for transformers.

    Raises:
        ConfigError: the model can't be loaded as asked.
        UnsupportedModel: it can't run on paged memory.
    """
    if isinstance(source, nn.Module):
        return _live(source, device, dtype) if hasattr(source, "config") else None
    place = _place(source)
    if place is None:
        if isinstance(source, (str, Path)) and Path(source).expanduser().is_file():
            raise ConfigError(f"{source} is a file, and no GGUF file; give the folder with the model's config.json")
        return None
    folder, options = place
    if not allow_pickle or ranks is not None:
        _refuse_pickle(folder, options)
    if ranks is not None:
        return _shard(source, folder, options, device, _dtype(dtype) or "auto", trust_remote_code, ranks)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    if device != "cpu":
        options["device_map"] = device
    wanted = _dtype(dtype) or "auto"
    _announce(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=wanted,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            **options,
        )
    except _UNREADABLE as error:
        raise ConfigError(_why_not(source, folder, error)) from error
    with _named_in_errors(source):
        return HFPagedModel(model.eval(), name=str(source))


def load_tokenizer(source: Any, *, trust_remote_code: bool = False) -> Any | None:
    """The transformers tokenizer that belongs to ``source``, or None if there is none.

    Raises:
        ConfigError: there is one, and it can't be loaded.
    """
    if isinstance(source, HFPagedModel):
        source = source.model
    if isinstance(source, nn.Module):
        source = getattr(getattr(source, "config", None), "name_or_path", None)
    place = _place(source) if source else None
    if place is None:
        return None
    folder, options = place
    _announce(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a broken tokenizer.json raises a plain Exception
        if isinstance(folder, Path) and not any(folder.glob("*token*")) and not options:
            return None  # a folder with weights only
        raise ConfigError(_why_not(f"the tokenizer of {source}", folder, error)) from error


def _shard(
    source: Any,
    folder: Path | str,
    options: dict[str, Any],
    device: str | None,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    ranks: Ranks,
) -> SplitPagedModel:
    if options:
        raise ConfigError(
            f"tensor_parallel_size is {ranks.size}, and {source} is a GGUF file, which is read whole; leave "
            "tensor_parallel_size out, or give a folder of safetensors"
        )
    _announce(folder)
    try:
        model = load_shard(source, folder, device, dtype, trust_remote_code, ranks)
    except _UNREADABLE as error:
        raise error if isinstance(error, ConfigError) else ConfigError(_why_not(source, folder, error)) from error
    with _named_in_errors(source):
        return SplitPagedModel(model.eval(), str(source), ranks.size)


@contextmanager
def _named_in_errors(source: Any) -> Iterator[None]:
    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"{source} can't run on paged memory: {error}; in a program of yours, paged_generate(model) falls back to "
            "what transformers does"
        ) from error


def _live(model: nn.Module, device: str | None, dtype: str | None) -> HFPagedModel:
    """The user's own model object, which is never moved or cast."""
    parameter = next(model.parameters())
    wanted = _dtype(dtype)
    places = (None, "auto", parameter.device.type, str(parameter.device))
    if wanted not in (None, parameter.dtype) or device not in places:
        raise ConfigError(
            f"the model given is {parameter.dtype} on {parameter.device}, and {dtype or parameter.dtype} on "
            f"{device or parameter.device} is asked for; call model.to(...) yourself, it is yours"
        )
    return HFPagedModel(model)


def _place(source: Any) -> tuple[Path | str, dict[str, Any]] | None:
    """The place from which transformers loads, and the options for it."""
    if source == embedded.NAME and not Path(source).exists():
        return embedded.embedded_folder(), {}
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"{path} doesn't exist")
        return path.parent, {"gguf_file": path.name}
    if path.is_dir():
        return path, {}
    return (source, {}) if isinstance(source, str) and _HUB_ID.fullmatch(source) else None


def _announce(folder: Path | str) -> None:
    """Log what is going on, because the hub may take minutes, even to find out that there is no network."""
    if isinstance(folder, Path) or HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(folder, "config.json"), str):
        return
    _log.warning("no folder called %s is here: asking the Hugging Face hub for it", folder)


def _why_not(what: Any, folder: Path | str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{what} brings its own code, which isn't run; if you trust it, load it yourself with "
            "trust_remote_code=True, and give the model in place of its name"
        )
    told = str(error).strip().split("\n", 1)[0]  # the other lines list all classes, or repeat the manual
    taken = "" if isinstance(folder, Path) else " (no such folder is here, so it was taken for a hub id)"
    return f"{what} can't be loaded: {told}{taken}"


def _refuse_pickle(folder: Path | str, options: dict[str, Any]) -> None:
    if not isinstance(folder, Path) or options or any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in _PICKLED for path in folder.glob(pattern)]
    if pickled:
        raise ConfigError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run any code when it is read; "
            "convert it to safetensors; or, if you trust it, load it yourself and give the model in place of its "
            "folder (TorchServe archives have allow_pickle for that)"
        )


def _check_device(device: str) -> None:
    """Raise ConfigError, before anything is loaded, for a device that torch doesn't know or have."""
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"device is {device!r}, which this torch ({torch.__version__}) can't use here; "
            "leave it out for a GPU if there is one, else the CPU"
        ) from error


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None or name == "auto":
        return None
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {name!r}; use {', '.join(_DTYPES)} or auto")
    dtype: torch.dtype = getattr(torch, name)
    return dtype

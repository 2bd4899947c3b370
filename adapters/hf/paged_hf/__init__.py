"""Hugging Face transformers models on paged memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_hf.embedded import embedded_folder
    from paged_hf.generate import PagedGenerate, paged_generate
    from paged_hf.report import Report

__all__ = ["PagedGenerate", "Report", "embedded_folder", "paged_generate"]

# Imported when first used: plugins are looked through without loading transformers.
_LAZY = {"PagedGenerate": "generate", "Report": "report", "embedded_folder": "embedded", "paged_generate": "generate"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_hf' has no attribute {name!r}")
    return getattr(import_module(f"paged_hf.{_LAZY[name]}"), name)

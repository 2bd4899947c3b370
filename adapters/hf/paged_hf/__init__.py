"""Hugging Face transformers models on paged memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_hf.generate import PagedGenerate, paged_generate
    from paged_hf.report import Report

__all__ = ["PagedGenerate", "Report", "paged_generate"]


def __getattr__(name: str) -> Any:
    """Imported when first used: plugins are looked through without loading transformers."""
    if name not in __all__:
        raise AttributeError(f"module 'paged_hf' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("paged_hf.report" if name == "Report" else "paged_hf.generate"), name)

"""Hugging Face transformers models on paged memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_hf.generate.patched import PagedGenerate, paged_generate
    from paged_hf.generate.report import Report
    from paged_hf.loading.embedded import embedded_folder

__all__ = ["PagedGenerate", "Report", "embedded_folder", "paged_generate"]

# Imported when first used, so that finding plugins does not load transformers.
_LAZY = {
    "PagedGenerate": "generate.patched",
    "Report": "generate.report",
    "embedded_folder": "loading.embedded",
    "paged_generate": "generate.patched",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_hf' has no attribute {name!r}")
    return getattr(import_module(f"paged_hf.{_LAZY[name]}"), name)

"""An HTTP server: OpenAI's and TGI's routes over an AsyncEngine. Its names are for paged_ray, which builds on it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_openai.app import AppOptions, create_app
    from paged_openai.responses import error_response, form_of
    from paged_openai.service import Service

# Imported when first used, so that the command line works without a server's packages.
_LAZY = {
    "AppOptions": "app",
    "Service": "service",
    "create_app": "app",
    "error_response": "responses",
    "form_of": "responses",
}

__all__ = ["AppOptions", "Service", "create_app", "error_response", "form_of"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'paged_openai' has no attribute {name!r}")
    return getattr(import_module(f"paged_openai.{_LAZY[name]}"), name)

"""Exceptions of other code (a tokenizer, a template) in a server's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def as_outcome(function: Callable[..., _T], *args: object) -> _T:
    """``function(*args)``, inside an event loop or in a thread that answers one. An exception fails only one request.

    Raises:
        RuntimeError: in place of what would end the loop (SystemExit, KeyboardInterrupt, one's own BaseException), pass
            for the request's cancellation, or be carried by no Future (StopIteration).
        Exception: any other that ``function`` raises.
    """
    try:
        return function(*args)
    except StopIteration as error:
        raise RuntimeError(f"serving the request raised {error!r}") from error
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"serving the request raised {error!r}") from error

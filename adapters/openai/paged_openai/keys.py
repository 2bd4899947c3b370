"""API keys. Knows nothing of the routes that they protect."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from paged_core import ConfigError
from paged_openai.responses import error_response, form_of
from paged_serving import CallError, Failure

_OPEN_TO_ALL = frozenset({"/health", "/ping", "/ready", "/metrics"})  # for probes and scrapers: no prompts, no texts


class KeyCheck:
    """ASGI middleware: calls need ``Authorization: Bearer KEY``, or Anthropic's ``x-api-key: KEY``, with one of the
    keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _open_to_all(scope) or self._knows(scope):
            return await self._app(scope, receive, send)
        refused = CallError(Failure.UNAUTHORIZED, "give one of this server's API keys as Authorization: Bearer KEY")
        return await error_response(form_of(scope["path"]), refused)(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        """Takes the same time for any key: all are compared, as digests of one length."""
        headers = dict(reversed(scope["headers"]))  # the first of each name
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = [key.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip()]
        digests = [_digest(each) for each in given]
        found = [hmac.compare_digest(digest, known) for digest in digests for known in self._digests]
        return any(found)


def _open_to_all(scope: Scope) -> bool:
    """Whether a route needs no key. The page for browsers holds no data; POST to the same path is a call."""
    return scope["path"] in _OPEN_TO_ALL or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))


def read_keys(path: Path) -> list[str]:
    """One key a line; empty lines and lines that begin with # are left out.

    Raises:
        ConfigError: the file can't be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the API keys can't be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} holds no API key; a server without keys is one without --api-key-file")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

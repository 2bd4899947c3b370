"""Errors in each protocol's own form: HTTP status and body. Knows no HTTP beyond the status."""

from __future__ import annotations

from enum import Enum
from typing import Any

from paged_core import EngineBusyError, EngineDeadError, InvalidRequestError
from paged_serving.protocol.parsing import ProtocolError

# The beginning of errors that are the request's own fault but appear only during generation.
_OWN_FAULT = ("no token is left to choose", "the grammar can't be followed")


class Failure(Enum):
    """What can go wrong: (status and type for OpenAI's clients, status and type for TGI's)."""

    INVALID = (400, "invalid_request_error", 422, "validation")
    UNAUTHORIZED = (401, "authentication_error", 401, "authentication")
    FORBIDDEN = (403, "permission_error", 403, "authentication")
    NOT_FOUND = (404, "not_found_error", 404, "not_found")
    NOT_ALLOWED = (405, "invalid_request_error", 405, "validation")
    TOO_SLOW = (408, "invalid_request_error", 408, "validation")
    TOO_LARGE = (413, "invalid_request_error", 413, "validation")
    OVERLOADED = (503, "overloaded_error", 429, "overloaded")
    UNAVAILABLE = (503, "server_error", 503, "unhealthy")  # not ready, shutting down, or failed for good
    CUT = (503, "server_error", 500, "incomplete_generation")  # by a shutdown
    TIMEOUT = (504, "timeout_error", 500, "incomplete_generation")
    GENERATION = (500, "server_error", 424, "generation")
    INTERNAL = (500, "server_error", 500, "unhealthy")


_OF_ANTHROPIC = {  # failure -> status and type for Anthropic's clients, where they aren't OpenAI's and "api_error"
    Failure.INVALID: (400, "invalid_request_error"),
    Failure.UNAUTHORIZED: (401, "authentication_error"),
    Failure.FORBIDDEN: (403, "permission_error"),
    Failure.NOT_FOUND: (404, "not_found_error"),
    Failure.NOT_ALLOWED: (405, "invalid_request_error"),
    Failure.TOO_SLOW: (408, "invalid_request_error"),
    Failure.TOO_LARGE: (413, "request_too_large"),
    Failure.OVERLOADED: (529, "overloaded_error"),
    Failure.TIMEOUT: (504, "timeout_error"),
}


class CallError(Exception):
    """A call that can't be answered for a reason outside its body. ``which``: the prompt at fault, of several."""

    def __init__(self, failure: Failure, message: str, which: str | None = None) -> None:
        super().__init__(message if which is None else f"{which}: {message}")
        if failure is Failure.GENERATION and message.startswith(_OWN_FAULT):
            failure = Failure.INVALID
        self.failure = failure


def openai_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """(status, body) for OpenAI's clients."""
    failure, message = _told(error)
    status, kind = failure.value[:2]
    param = code = None
    if isinstance(error, InvalidRequestError):
        param = error.param
    if isinstance(error, ProtocolError):
        code = error.code
        if error.status != 400:
            status, kind = error.status, Failure.NOT_FOUND.value[1] if error.status == 404 else kind
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """(status, body) for Anthropic's clients. Its status 529 means a busy server."""
    failure, message = _told(error)
    status, kind = _OF_ANTHROPIC.get(failure, (failure.value[0], "api_error"))
    if isinstance(error, ProtocolError) and error.status == 404:
        status, kind = _OF_ANTHROPIC[Failure.NOT_FOUND]
    return status, {"type": "error", "error": {"type": kind, "message": message}}


def tgi_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """(status, body) for TGI's clients."""
    failure, message = _told(error)
    status, kind = failure.value[2:]
    return status, {"error": message, "error_type": kind}


def _told(error: Exception) -> tuple[Failure, str]:
    if isinstance(error, CallError):
        return error.failure, str(error)
    if isinstance(error, InvalidRequestError):
        return Failure.INVALID, str(error)
    if isinstance(error, EngineBusyError):
        return Failure.OVERLOADED, str(error)
    if isinstance(error, EngineDeadError):
        return Failure.UNAVAILABLE, "the engine has stopped: the server is going down, or must be restarted"
    return Failure.INTERNAL, "the server failed; its log says more"

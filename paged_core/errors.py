"""All exceptions that the project raises on purpose.

PagedCoreError
├── ConfigError (ValueError)         an EngineConfig value that can't work
├── UnsupportedModel                 the model can't run on paged memory; the message says why
├── PluginError                      a plugin is missing, misspelt or broken
├── ReentryError (RuntimeError)      a call that would wait for the very step it was made in
├── RequestError                     a request ended in an error; carries the request id
├── EngineBusyError                  the engine holds as many requests as it may; try again soon
└── EngineDeadError                  the engine has stopped and takes no more requests
InvalidRequestError (ValueError)     the request can't be served as asked (raised to who asks: add_request, read_kv)
"""

from paged_core.scheduling.params import InvalidRequestError

__all__ = [
    "ConfigError",
    "EngineBusyError",
    "EngineDeadError",
    "InvalidRequestError",
    "PagedCoreError",
    "PluginError",
    "ReentryError",
    "RequestError",
    "UnsupportedModel",
]


class PagedCoreError(Exception):
    """Base of the project's own errors."""


class ConfigError(PagedCoreError, ValueError):
    """A configuration value that can't work; the message names the value, the limit and the way out."""


class UnsupportedModel(PagedCoreError):
    """The model can't run on paged memory. The message says what stands in the way."""


class PluginError(PagedCoreError):
    """No plugin answered a hook, or a plugin can't be used."""


class ReentryError(PagedCoreError, RuntimeError):
    """Code inside a step (such as a logits processor) has made a call that would wait for the end of that step."""


class RequestError(PagedCoreError):
    """A request ended in an error of its own."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(f"request {request_id}: {message}")
        self.request_id = request_id


class EngineBusyError(PagedCoreError):
    """The engine has as many open requests, or looks, as it may have. Nothing was queued."""


class EngineDeadError(PagedCoreError):
    """The engine was shut down, or its model has failed permanently."""

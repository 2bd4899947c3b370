"""What would stand between TorchServe's frontend and the handler, for all models of a server, is passed by.

Its request envelopes (``service_envelope``) stand around a handler, read the first request of a batch only, and no step
after it. What they translate from, ``bodies`` reads itself.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def pass_envelopes_by() -> None:
    """For this process. An envelope that has been made asks its class at every call."""
    base = sys.modules.get("ts.torch_handler.request_envelope.base")
    if base is not None:
        for kind in base.BaseEnvelope.__subclasses__():
            kind.parse_input = kind.format_output = _as_it_is


def have_bodies_decoded() -> None:
    """For this process, whatever decode_input_request in config.properties says: one way of asking is told from another
    by that its body is JSON."""
    os.environ.pop("TS_DECODE_INPUT_REQUEST", None)


def _as_it_is(envelope: Any, data: Any) -> Any:
    return data

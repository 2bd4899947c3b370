"""FrontendRequest: one request from TorchServe's frontend, and how its answer can be sent."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

Parts = Mapping[str, Any]  # name -> value: dict, list or str where TorchServe has decoded it, else bytes
_FORM = "application/x-www-form-urlencoded"
_MODEL_INFER = {"id", "model_name", "inputs"}  # what the frontend makes of a ModelInferRequest, whatever else it holds


class Carrier(Enum):
    """The way of an answer to its client. Their limits are those of TorchServe 0.12.0's RestJob, GRPCJob and
    ContinuousBatching."""

    HTTP = auto()  # as many messages as there are
    WHOLE = auto()  # one message: a workflow's node, or a route that can't be told from one
    GRPC = auto()  # one message that says that it is the last: a second one, or none that says so, kills the worker
    TENSORS = auto()  # gRPC's ModelInfer: as GRPC, and what isn't a V2 answer of KServe's kills the worker too


class FrontendRequest(NamedTuple):
    id: str
    parts: Parts  # empty when another worker has been given them: the frontend hands them over only once
    headers: Mapping[str, Any]  # of HTTP; a part's name stands for that part's own headers, a mapping
    may_be_orphan: bool = False  # whether another worker may have begun to answer

    @property
    def carrier(self) -> Carrier:
        if not any(isinstance(value, str) for value in self.headers.values()):
            return Carrier.TENSORS if self._is_model_infer else Carrier.GRPC
        # The frontend's routes for predictions add a header of their own; its workflows and its oldest routes don't.
        return Carrier.HTTP if isinstance(self.headers.get("explain"), str) else Carrier.WHOLE

    @property
    def _is_model_infer(self) -> bool:
        """Bodies of gRPC's other methods are bytes."""
        body = self.parts.get("body")
        return isinstance(body, Mapping) and body.keys() == _MODEL_INFER

    @property
    def route(self) -> str:
        """What follows the model's version in the URL; elsewhere than in HTTP, a part of that name says it."""
        path = self.headers.get("url_path")
        if not isinstance(path, str):
            path = self.parts.get("url_path", "")
        if isinstance(path, bytes | bytearray):
            path = path.decode(errors="replace")
        return str(path).strip("/")

    @property
    def body(self) -> Any:
        return self.parts.get("body", self.parts.get("data"))

    @property
    def lost_its_body(self) -> bool:
        """Whether the request had a body that did not arrive here."""
        length = self._header("content-length")
        return not self.parts and length not in (None, "0")

    @property
    def is_orphan(self) -> bool:
        """Whether an earlier worker had the request, and may have begun to answer."""
        return self.may_be_orphan and self.lost_its_body

    @property
    def is_form(self) -> bool:
        return str(self._header("content-type")).startswith(_FORM)

    def _header(self, wanted: str) -> str | None:
        found = [value for name, value in self.headers.items() if name.lower() == wanted and isinstance(value, str)]
        return found[0] if found else None

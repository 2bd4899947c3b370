"""KServe's two protocols: V1's ``instances`` and V2's tensors of texts, answered in the same form.

Sources: KServe's Data Plane V1, and its Open Inference Protocol (V2). A text is a BYTES element of a tensor. In V2 each
tensor of the body is answered by one of its name, as TorchServe's own envelope does.

V2 comes by gRPC too (ModelInfer). Its elements are in base64 there, and TorchServe 0.12.0 makes a ModelInferResponse of
the answer: one without an id, a model's name and version, and tensors would end its worker.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from paged_core import GenerationOutput
from paged_serving import ProtocolError, tgi_error
from paged_torchserve.forms import TEXTS, ReplyFormat
from paged_torchserve.plain import PROMPTS, PlainCall, as_text, take_parameters
from paged_torchserve.target import Target

_V1, _V2 = {"instances", "parameters"}, {"id", "inputs", "parameters", "model_name", "outputs"}


class V1Call(PlainCall):
    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        return {"predictions": self.texts(results)}


class V2Call(PlainCall):
    """``sizes``: name and number of texts of each tensor; their texts in a row are the call's prompts."""

    def __init__(self, about: Mapping[str, Any], sizes: Sequence[tuple[str, int]], *call: Any) -> None:
        super().__init__(*call)
        self._about, self._sizes = about, sizes

    def answer(self, results: Sequence[GenerationOutput]) -> Any:
        texts = iter(self.texts(results))
        outputs = [_tensor(name, list(islice(texts, size))) for name, size in self._sizes]
        return {**self._about, "outputs": outputs}


def kserve_call(fields: Mapping[str, Any], request_id: str, target: Target) -> PlainCall | None:
    """The call of a body in one of KServe's forms; None: it has neither form.

    Raises:
        ProtocolError: it can't be served.
    """
    if "instances" in fields:
        return _v1(fields, target)
    inputs = fields.get("inputs")
    if isinstance(inputs, list) and inputs and all(isinstance(each, Mapping) for each in inputs):
        return _v2(fields, _about(fields.get("id") or request_id, target), target)
    return None


def infer_call(fields: Mapping[str, Any], target: Target) -> PlainCall:
    """The call of a ModelInferRequest.

    Raises:
        ProtocolError: it can't be served.
    """
    inputs = [{**tensor, "data": _decoded(tensor)} for tensor in fields["inputs"]]
    return _v2({**fields, "inputs": inputs}, _about(fields["id"], target), target)


def infer_form(fields: Mapping[str, Any], target: Target) -> ReplyFormat:
    """The form of a ModelInferRequest's answer. TorchServe has no status for a single request, so an error is the text
    of a tensor named ``error``."""

    def error(failure: Exception) -> tuple[int, dict[str, Any]]:
        status, told = tgi_error(failure)
        return status, {**_about(fields["id"], target), "outputs": [_tensor("error", [told["error"]])]}

    return TEXTS._replace(error=error)


def _about(request_id: Any, target: Target) -> dict[str, Any]:
    return {"id": request_id, "model_name": target.served.names[0], "model_version": target.version}


def _tensor(name: str, texts: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": texts}


def _decoded(tensor: Mapping[str, Any]) -> Any:
    """The values of a tensor from TorchServe; those of types other than BYTES are unchanged."""
    data = tensor.get("data")
    if tensor.get("datatype") != "BYTES":
        return data
    if not data:
        told = f"inputs: {tensor.get('name')!r} is empty; put its texts into contents.bytes_contents"
        raise ProtocolError(f"{told} (TorchServe doesn't hand over raw_input_contents)", "inputs")
    return [as_text(b64decode(each)) for each in data]


def _v1(fields: Mapping[str, Any], target: Target) -> PlainCall:
    _check_known(fields, _V1)
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances:
        raise ProtocolError("instances must be a list, and not empty", "instances")
    prompts = [_instance(each) for each in instances]
    return V1Call(prompts, _parameters(fields, target, prompts), False, target.served)


def _v2(fields: Mapping[str, Any], about: Mapping[str, Any], target: Target) -> PlainCall:
    _check_known(fields, _V2)
    if fields.get("outputs"):
        raise ProtocolError("outputs can't be chosen: each input is answered by a tensor of its name", "outputs")
    if not fields["inputs"]:
        raise ProtocolError("inputs must be a list of tensors, and not empty", "inputs")
    prompts: list[str] = []
    sizes = []
    for tensor in fields["inputs"]:
        texts = _texts(tensor)
        prompts += texts
        sizes.append((str(tensor.get("name", "")), len(texts)))
    return V2Call(about, sizes, prompts, _parameters(fields, target, prompts), False, target.served)


def _parameters(fields: Mapping[str, Any], target: Target, prompts: Sequence[str]) -> dict[str, Any]:
    return take_parameters({"parameters": fields.get("parameters")}, target, prompts)


def _check_known(fields: Mapping[str, Any], known: set[str]) -> None:
    for name in fields:
        if name not in known:
            raise ProtocolError(f"{name} isn't a field of KServe's; what a model takes goes into parameters", name)


def _instance(value: Any) -> str:
    if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in PROMPTS:
        (value,) = value.values()
    if not isinstance(value, str):
        told = f"instances must be texts, or objects with one of {', '.join(PROMPTS)}; what else is asked for goes"
        raise ProtocolError(f"{told} into parameters, beside instances", "instances")
    return value


def _texts(tensor: Mapping[str, Any]) -> list[str]:
    name, data = tensor.get("name"), tensor.get("data")
    if tensor.get("datatype") != "BYTES":
        raise ProtocolError(f"inputs: {name!r} is of type {tensor.get('datatype')!r}; texts are BYTES", "inputs")
    texts = [data] if isinstance(data, str) else data
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise ProtocolError(f"inputs: data of {name!r} must be a list of texts", "inputs")
    return texts

"""gRPC clients of a real TorchServe, with stubs of the protos in its jar."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import grpc_tools.protoc

_INFERENCE, _OPEN = "inference", "open_inference_grpc"


class Grpc:
    """Asks the model "tiny". ``folder``: where the stubs are made."""

    def __init__(self, folder: Path, address: str) -> None:
        self.messages, services = _stubs(folder, _INFERENCE)
        self.tensors, open_services = _stubs(folder, _OPEN)
        self.channel = grpc.insecure_channel(address)
        self.stub = services.InferenceAPIsServiceStub(self.channel)
        self.open_stub = open_services.GRPCInferenceServiceStub(self.channel)

    def request(self, **parts: str) -> Any:
        encoded = {name: value.encode() for name, value in parts.items()}
        return self.messages.PredictionsRequest(model_name="tiny", input=encoded)

    def predict(self, **parts: str) -> str:
        return self.stub.Predictions(self.request(**parts), timeout=60).prediction.decode()

    def stream(self, **parts: str) -> str:
        """Return all messages of a stream as one text. TorchServe 0.12.0 passes on only one message of a stream."""
        pieces = list(self.stub.StreamPredictions(self.request(**parts), timeout=60))
        return b"".join(piece.prediction for piece in pieces).decode()

    def infer(self, tensors: Mapping[str, Sequence[str | bytes | int]], request_id: str = "") -> Any:
        request = self.tensors.ModelInferRequest(model_name="tiny", id=request_id)
        for name, values in tensors.items():
            kind = "INT64" if any(isinstance(each, int) for each in values) else "BYTES"
            tensor = request.inputs.add(name=name, datatype=kind, shape=[len(values)])
            if kind == "INT64":
                tensor.contents.int64_contents.extend(values)
            else:
                tensor.contents.bytes_contents.extend(
                    each.encode() if isinstance(each, str) else each for each in values
                )
        return self.open_stub.ModelInfer(request, timeout=60)

    def texts(self, answer: Any) -> dict[str, list[str]]:
        """Return name of a tensor -> its texts, which TorchServe writes as JSON."""
        for each in answer.outputs:
            assert (each.datatype, each.shape) == ("BYTES", [len(each.contents.bytes_contents)])
        return {each.name: [json.loads(text) for text in each.contents.bytes_contents] for each in answer.outputs}


def _stubs(folder: Path, name: str) -> tuple[Any, Any]:
    """Return (messages, services) of one proto."""
    (package,) = find_spec("ts").submodule_search_locations
    with zipfile.ZipFile(Path(package) / "frontend" / "model-server.jar") as jar:
        for member in (f"{name}.proto", "google/rpc/status.proto"):
            jar.extract(member, folder)
    include = [f"-I{folder}", f"-I{Path(grpc_tools.protoc.__file__).parent / '_proto'}"]
    made = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
    assert grpc_tools.protoc.main(["protoc", *include, *made, f"{name}.proto"]) == 0
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}_pb2"), importlib.import_module(f"{name}_pb2_grpc")
    finally:
        sys.path.remove(str(folder))

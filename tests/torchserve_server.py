"""A real TorchServe on the loopback device, and helpers for its tests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch

import tiny_folder
from free_ports import free_ports
from paged_torchserve.inquiries import Addresses
from paged_torchserve.server import TorchServe

READY_S = 600  # a worker imports torch and transformers, which takes long on a busy machine
MAX_MESSAGE = 20_000
ENGINE = ["--set", "attention_backend=reference", "--set", "kv_cache_bytes=3000000", "--set", "return_full_text=false",
          "--set", "heartbeat_s=1.5", "--set", f"max_reply_bytes={MAX_MESSAGE - 100}"]  # fmt: skip
LONG = {"prompt": "a long story", "max_new_tokens": 1900, "stream": True}


class Running:
    """One server, and calls that tests make."""

    def __init__(self, server: TorchServe, kept: Path | None = None) -> None:
        at = server.options.addresses
        self.server = server
        self.kept = kept  # the folder where "tiny" keeps K/V on disk
        self.url, self.management = at.url(at.inference), at.url(at.management)
        self.metrics_url = at.url(at.metrics) + "/metrics"
        self.client = httpx2.Client(timeout=60, trust_env=False)

    def post(self, path: str, **what: Any) -> httpx2.Response:
        return self.client.post(f"{self.url}/predictions/{path}", **what)

    def workers(self, model: str) -> list[dict[str, Any]]:
        return self.client.get(f"{self.management}/models/{model}").json()[0]["workers"]

    def worker(self, model: str) -> dict[str, Any]:
        return self.workers(model)[0]

    def metric(self, name: str, model: str) -> float:
        found = re.search(rf'^{name}{{ModelName="{model}".*}} (\S+)$', self.client.get(self.metrics_url).text, re.M)
        return float(found[1]) if found else 0.0

    @contextmanager
    def streaming(self, model: str, body: Any = LONG) -> Iterator[Iterator[bytes]]:
        """Yield the pieces of a long answer after its first one. The stream is closed at the end of the block."""
        with (
            httpx2.Client(timeout=60, trust_env=False) as client,
            client.stream("POST", f"{self.url}/predictions/{model}", json=body) as response,
        ):
            assert response.status_code == 200
            pieces = response.iter_bytes()
            next(pieces)
            yield pieces


def free_addresses() -> Addresses:
    inference, management, metrics, grpc, _ = free_ports(5)  # gRPC takes two
    return Addresses(inference=inference, management=management, metrics=metrics, grpc=grpc)


def stock_archive(tmp: Path, name: str, model: Path, handler: Path, config: str) -> Path:
    """Make an archive by TorchServe's own archiver."""
    (tmp / "model-config.yaml").write_text(config)
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", "1.0",
               "--handler", handler, "--extra-files", model, "--export-path", tmp,
               "--config-file", tmp / "model-config.yaml"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return tmp / f"{name}.mar"


def stock_generate() -> Callable[[str, int], str]:
    """Return a function that gives the text of the tiny model's ``model.generate``."""
    model, tokenizer = tiny_folder.tiny_model(), tiny_folder.byte_tokenizer()

    def generate(prompt: str, num_tokens: int) -> str:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return generate

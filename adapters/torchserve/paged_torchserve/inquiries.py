"""Asks a TorchServe about itself: the states of its workers, and how many requests they hold."""

from __future__ import annotations

import json
import re
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the machine itself: past any proxy
_OPEN = re.compile(r'^paged_requests_(?:running|waiting){ModelName="([^"]*)".*} (\S+)$', re.M)


@dataclass(frozen=True)
class Addresses:
    host: str = "127.0.0.1"
    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc: int = 7070  # and the next

    def url(self, port: int) -> str:
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{port}"


@dataclass(frozen=True)
class Inquiries:
    at: Addresses
    key_file: Path | None  # None: it asks for no tokens

    def num_open(self) -> float:
        """Requests that run or wait in our workers, by their metrics. A model without a worker has none, whatever its
        last metrics were."""
        try:
            with _OPENER.open(f"{self.at.url(self.at.metrics)}/metrics", timeout=10) as answer:
                told = answer.read().decode()
        except (OSError, ValueError):
            return 0
        counts: dict[str, float] = {}
        for name, count in _OPEN.findall(told):
            counts[name] = counts.get(name, 0.0) + float(count)
        return sum(count for name, count in counts.items() if count and "READY" in self.statuses(name))

    def is_ready(self, model: str) -> bool:
        """Whether all its workers are."""
        statuses = self.statuses(model)
        return bool(statuses) and set(statuses) == {"READY"}

    def statuses(self, model: str) -> list[str]:
        """Of the workers of ``model``, in all its versions. Uses the plain description, because a customized one blocks
        an idle continuous model."""
        request = urllib.request.Request(f"{self.at.url(self.at.management)}/models/{model}/all")
        if self.key_file is not None:
            with suppress(OSError, ValueError, KeyError):
                keys = json.loads(self.key_file.read_text(encoding="utf-8"))
                request.add_header("Authorization", f"Bearer {keys['management']['key']}")
        try:
            with _OPENER.open(request, timeout=10) as answer:
                return [worker["status"] for version in json.load(answer) for worker in version["workers"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

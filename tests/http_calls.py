"""Calls to a server by HTTP: a long one, one that runs in a thread of its own, and the events of an answer."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx2

from http_server import LIMIT_S, Running

LONG = {"prompt": "!", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(each) if each != "[DONE]" else each for each in data]


class Background:
    """A request that runs in a thread of its own. ``began`` is set when its answer begins; for a streamed one, at its
    first event."""

    def __init__(self, server: Running, path: str, body: dict[str, Any]) -> None:
        self._server, self._path, self._body = server, path, body
        self.began = threading.Event()
        self.response: httpx2.Response | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._server.client() as client, client.stream("POST", self._path, json=self._body) as response:
            self.began.set()
            response.read()
            self.response = response

    def result(self) -> httpx2.Response:
        self._thread.join(LIMIT_S)
        assert self.response is not None, "no answer came"
        return self.response

"""The clients of a load test, and their records: HTTP endpoints of three protocols, or an AsyncEngine. The HTTP client
is a few lines over asyncio, and parses events only after the run, because it shares the cores with the server and is
measured with it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from paged_core import AsyncEngine, SamplingParams

PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions", "tgi": "/generate_stream"}


@dataclass(frozen=True)
class Ask:
    """One request, greedy."""

    index: int
    prompt: str
    token_ids: tuple[int, ...]  # the same, for protocols that take ids
    num_output: int
    arrival_s: float = 0.0  # since the start of the run


@dataclass
class TimedAnswer:
    """An answer. Times are seconds since the start of the run."""

    index: int
    arrival_s: float
    times_s: list[float] = field(default_factory=list)  # of each piece
    num_tokens: int = 0
    text: str = ""
    error: str | None = None


class TestedServer(Protocol):
    async def ask(self, ask: Ask, answer: TimedAnswer, began: float) -> None:
        """Fill in ``answer``. If this raises, the answer is an error."""
        ...


async def drive(
    target: TestedServer, asks: Sequence[Ask], concurrency: int | None, told: Callable[[int], object]
) -> tuple[list[TimedAnswer], float]:
    """Each request at its arrival, at most ``concurrency`` at once. Returns the answers and the run's seconds."""
    room = asyncio.Semaphore(concurrency or len(asks))
    began, num_done = time.perf_counter(), 0

    async def one(ask: Ask) -> TimedAnswer:
        nonlocal num_done
        await asyncio.sleep(max(0.0, began + ask.arrival_s - time.perf_counter()))
        async with room:
            # A request that waited for --concurrency arrives when it is sent, because the load generator caused its
            # wait, not the server.
            arrival = time.perf_counter() - began if concurrency else ask.arrival_s
            answer = TimedAnswer(ask.index, arrival)
            try:
                await target.ask(ask, answer, began)
            except Exception as error:
                answer.error = f"{type(error).__name__}: {error}"
        num_done += 1
        told(num_done)
        return answer

    answers = await asyncio.gather(*[one(ask) for ask in asks])
    return list(answers), time.perf_counter() - began


def ignores_eos(backend: str, extra: dict[str, Any] | None = None) -> bool:
    """Whether answers continue after the end token, which may still be chosen. TGI has no field for it, so its answers
    end there; so do the others' if ``extra`` says so."""
    return backend != "tgi" and bool({"ignore_eos": True, **(extra or {})}["ignore_eos"])


class EngineTarget:
    """The engine itself, without HTTP. ``ignore_eos``: as for the servers that it is compared with."""

    def __init__(self, engine: AsyncEngine, ignore_eos: bool = True) -> None:
        self._engine, self._ignore_eos = engine, ignore_eos

    async def ask(self, ask: Ask, answer: TimedAnswer, began: float) -> None:
        params = SamplingParams(temperature=0, max_tokens=ask.num_output, ignore_eos=self._ignore_eos)
        async for delta in self._engine.submit(ask.token_ids, params):
            answer.times_s.append(time.perf_counter() - began)
            answer.num_tokens += len(delta.token_ids)
            answer.text += delta.text
            if delta.finish_reason not in (None, "stop", "length"):
                raise RuntimeError(delta.error or delta.finish_reason)


class HTTPTarget:
    """``url`` is the server's root; ``extra`` is added to every body; None removes a field."""

    def __init__(
        self, url: str, backend: str, model: str | None, api_key: str | None = None, extra: dict[str, Any] | None = None
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, f"{url} has no host"
        self._backend, self._model, self._extra = backend, model, extra or {}
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._head = f"POST {parts.path.rstrip('/')}{PATHS[backend]} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self._head += "Content-Type: application/json\r\nAccept: text/event-stream\r\nConnection: close\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"

    async def ask(self, ask: Ask, answer: TimedAnswer, began: float) -> None:
        body = json.dumps(self._body(ask)).encode()
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=2**22)
        pieces: list[tuple[float, bytes]] = []
        try:
            writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            async for data in _body_pieces(reader):
                pieces.append((time.perf_counter() - began, data))
        finally:
            writer.close()
        self._read(pieces, answer)

    def _body(self, ask: Ask) -> dict[str, Any]:
        if self._backend == "tgi":
            parameters = {"max_new_tokens": ask.num_output, **self._extra}
            return {"inputs": ask.prompt, "parameters": _without_nulls(parameters)}
        body = {"model": self._model, "max_tokens": ask.num_output, "temperature": 0, "stream": True,
                "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
        if self._backend == "openai":
            body["prompt"] = ask.token_ids
        else:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        return _without_nulls({**body, **self._extra})

    def _read(self, pieces: Sequence[tuple[float, bytes]], answer: TimedAnswer) -> None:
        """Raises RuntimeError if the stream holds an error."""
        rest, num_events = b"", 0
        for now, data in pieces:
            *lines, rest = (rest + data).split(b"\n")
            events = [
                json.loads(line[5:]) for line in lines if line.startswith(b"data:") and b"[DONE]" not in line[:14]
            ]
            for event in events:
                if event.get("error"):
                    raise RuntimeError(str(event["error"]))
                answer.text += _text(event)
                answer.num_tokens = (event.get("usage") or {}).get("completion_tokens", answer.num_tokens)
            with_text = sum(bool(event.get("choices") or event.get("token")) for event in events)
            num_events += with_text
            if with_text:
                answer.times_s.append(now)
        answer.num_tokens = answer.num_tokens or num_events  # the server gives no count: an event is a token


def _text(event: dict[str, Any]) -> str:
    if "token" in event:
        return str(event["token"]["text"])
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in event["choices"])


async def _body_pieces(reader: asyncio.StreamReader) -> Any:
    """The pieces of a chunked body as they come. Raises RuntimeError for an answer that isn't a stream."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    if " 200 " not in head.split("\r\n")[0] or "chunked" not in head.lower():
        rest = await reader.read(2000)
        raise RuntimeError(f"{head.split(chr(13))[0]}: {rest.decode(errors='replace')[:300]}")
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}

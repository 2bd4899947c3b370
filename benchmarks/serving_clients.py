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
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from paged_core import SamplingParams

if TYPE_CHECKING:  # whoever imports this file settles its threads before torch is there
    from paged_core import AsyncEngine

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
    read_later: Callable[[], None] | None = None  # fills in the text; may raise


class TestedServer(Protocol):
    pid: int | None  # of a server process that is ours

    async def ask(self, ask: Ask, answer: TimedAnswer, began: float) -> None:
        """Fill in ``answer``. If this raises, the answer is an error."""
        ...


async def drive(
    target: TestedServer, asks: Sequence[Ask], concurrency: int | None, told: Callable[[int], object]
) -> tuple[list[TimedAnswer], float]:
    """Each request at its arrival, at most ``concurrency`` at once. Returns the answers, for ``read``, and the run's
    seconds."""
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
    return answers, time.perf_counter() - began


def read(answer: TimedAnswer) -> TimedAnswer:
    """Itself, with what was left unread while the clock ran."""
    if answer.read_later is not None:
        try:
            answer.read_later()
        except Exception as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.read_later = None
    return answer


def ignores_eos(backend: str, extra: dict[str, Any] | None = None) -> bool:
    """Whether answers continue after the end token, which may still be chosen. TGI has no field for it, so its answers
    end there; so do the others' if ``extra`` says so."""
    return backend != "tgi" and bool({"ignore_eos": True, **(extra or {})}["ignore_eos"])


class EngineTarget:
    """The engine itself, without HTTP. ``ignore_eos``: as for the servers that it is compared with."""

    def __init__(self, engine: AsyncEngine, ignore_eos: bool = True) -> None:
        self._engine, self._ignore_eos = engine, ignore_eos
        self.pid: int | None = None

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
        self.pid: int | None = None
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
        loop = asyncio.get_running_loop()
        _, come = await loop.create_connection(lambda: _Pieces(began), self._host, self._port, ssl=self._tls)
        come.transport.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            await come.over
        finally:
            come.transport.close()
        answer.read_later = lambda: self._read(_body_pieces(come.pieces), answer)

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


class _Pieces(asyncio.Protocol):
    """What comes over one connection until the server closes it, and when; unread."""

    transport: asyncio.Transport

    def __init__(self, began: float) -> None:
        self._began = began
        self.pieces: list[tuple[float, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter() - self._began, data))

    def connection_lost(self, error: Exception | None) -> None:
        if self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)


def _body_pieces(come: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """The chunks of a chunked body, each at the time at which its end came. Raises RuntimeError for an answer that is
    no stream, or isn't whole."""
    unread, at, pieces = bytearray(), "head", list[tuple[float, bytes]]()
    for now, data in come:
        unread += data
        if at == "head" and b"\r\n\r\n" in unread:
            head, _, unread = unread.partition(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n")[0] or b"chunked" not in head.lower():
                rest = bytes(unread) + b"".join(data for later, data in come if later > now)
                raise RuntimeError(f"{head.split(bytes([13]))[0].decode()}: {rest.decode(errors='replace')[:300]}")
            at = "body"
        while at == "body" and (piece := _first_chunk(unread)) is not None:
            at = "body" if piece else "end"
            pieces.append((now, piece))
    if at != "end":
        raise RuntimeError("the connection ended before its answer did")
    return pieces


def _first_chunk(unread: bytearray) -> bytes | None:
    """Taken off ``unread``; None: it has not come yet. An empty one is the last."""
    size, found, _ = unread.partition(b"\r\n")
    if not found or len(unread) < (end := len(size) + 2 + int(size.split(b";")[0], 16)) + 2:
        return None
    piece = bytes(unread[len(size) + 2 : end])
    del unread[: end + 2]
    return piece


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}

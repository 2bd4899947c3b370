"""KVEvents: publishes the contents of an engine's prefix cache to routers in other processes, in vLLM's format.

Batches of events in msgpack over ZeroMQ: each is a message of three frames: topic, sequence number (8 bytes,
big-endian) and payload. A second socket repeats batches from a number on. vLLM's documentation has a client for them
(kv_events_subscriber). Blocks are named by the first 64 bits of their digests, made with a key of the pool's own.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from paged_core import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheEvent,
    ConfigError,
    PluginError,
    hookimpl,
)

_log = logging.getLogger("paged_core")
FORMS = ("array", "map")
_KEPT = 10_000  # batches that can be asked for again
_WAITING = 100_000  # batches that may wait to be sent; beyond it the oldest are dropped, and their numbers are missing
_END = (-1).to_bytes(8, "big", signed=True)
_MEDIUM = "GPU"  # vLLM's word for the cache that attention reads, on a CPU too
_CLOSE_S = 2.0


class KVEvents:
    """A plugin: ``Engine(model, plugins=[KVEvents("tcp://*:5557", "tcp://*:5558")])``.

    Args:
        endpoint: where events are published. With ``*``, ``::`` or ``ipc://`` it is bound, else connected to.
        replay: where batches can be asked for again; None: nowhere.
        topic: of all messages.
        form: events as arrays, as published clients read them, or as maps with field names, as newer ones do.

    Raises:
        ConfigError: an address can't be had.
        PluginError: pyzmq isn't installed.
    """

    def __init__(self, endpoint: str, replay: str | None = None, topic: str = "", form: str = "array") -> None:
        try:
            import zmq
        except ImportError as error:
            raise PluginError("K/V events need pyzmq: pip install 'paged-core[events]'") from error
        if form not in FORMS:
            raise ConfigError(f"the form of K/V events is {form!r}; use {' or '.join(FORMS)}")
        self._zmq: Any = zmq
        self._context: Any = zmq.Context()
        self._pub = self._socket(zmq.PUB, endpoint, bind=any(mark in endpoint for mark in ("*", "::", "ipc://")))
        self._replay = None if replay is None else self._socket(zmq.ROUTER, replay, bind=True)
        self._topic, self._as_map = topic.encode(), form == "map"
        self._encode = msgspec.msgpack.Encoder().encode
        self._lock = threading.Lock()
        self._next = 0
        self._unsent: deque[tuple[int, float, Sequence[CacheEvent]]] = deque(maxlen=_WAITING)
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)
        self._closing = False
        self._bell, self._ear = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="paged-kv-events", daemon=True)
        self._thread.start()

    @hookimpl
    def on_prefix_cache_changed(self, events: Sequence[CacheEvent]) -> None:
        with self._lock:
            self._unsent.append((self._next, time.time(), events))
            self._next += 1
        self._ring()

    def close(self) -> None:
        """Send what is left, and end."""
        self._closing = True
        self._ring()
        self._thread.join(_CLOSE_S)

    # ---- in the thread, which alone touches the sockets ------------------------------------------------------------

    def _run(self) -> None:
        zmq = self._zmq
        poller = zmq.Poller()
        poller.register(self._ear, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while True:
            closing, heard = self._closing, dict(poller.poll(0 if self._closing else None))
            if self._ear.fileno() in heard:
                self._ear.recv(4096)
            try:
                self._send_all()
                if self._replay in heard:
                    self._repeat()
            except Exception:
                _log.exception("K/V events could not be sent")
            if closing:
                break
        for each in (self._pub, self._replay):
            if each is not None:
                each.close(linger=int(_CLOSE_S * 500))
        self._context.term()
        self._bell.close()
        self._ear.close()

    def _send_all(self) -> None:
        while self._unsent:
            with self._lock:
                number, stamp, events = self._unsent.popleft()
            payload = self._encode(self._batch(stamp, events))
            self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
            self._sent.append((number, payload))

    def _repeat(self) -> None:
        """Batches from the number asked for on, then an end mark."""
        assert self._replay is not None
        frames = self._replay.recv_multipart()
        if len(frames) != 3:
            _log.warning("a replay request has %d frames and not 3", len(frames))
            return
        client, _, start = frames
        first = int.from_bytes(start, "big")
        for number, payload in self._sent:
            if number >= first:
                self._replay.send_multipart((client, b"", number.to_bytes(8, "big"), payload))
        self._replay.send_multipart((client, b"", _END, b""))

    # ---- as vLLM spells it -----------------------------------------------------------------------------------------

    def _batch(self, stamp: float, events: Sequence[CacheEvent]) -> Any:
        told = [self._spelled(event) for event in joined(events)]
        return {"ts": stamp, "events": told, "data_parallel_rank": 0} if self._as_map else [stamp, told, 0]

    def _spelled(self, event: tuple[Any, ...]) -> Any:
        names = _FIELDS[event[0]]
        return dict(zip(("type", *names), event, strict=False)) if self._as_map else event[: 1 + _IN_ARRAYS[event[0]]]

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _socket(self, kind: int, address: str, *, bind: bool) -> Any:
        found = self._context.socket(kind)
        try:
            (found.bind if bind else found.connect)(address)
        except self._zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"K/V events can't be told at {address}: {error}; choose another address") from error
        return found

    def _ring(self) -> None:
        with suppress(OSError):
            self._bell.send(b"!")


_FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
                    "extra_keys"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}  # fmt: skip
_IN_ARRAYS = {"BlockStored": 6, "BlockRemoved": 2, "AllBlocksCleared": 0}  # fields that all published clients know


def joined(events: Sequence[CacheEvent]) -> list[tuple[Any, ...]]:
    """Events as (their names, their fields): consecutive blocks of one sequence are joined into one event."""
    found: list[tuple[Any, ...]] = []
    last: bytes | None = None
    for event in events:
        if isinstance(event, BlockStored):
            keys = None if event.salt is None else [event.salt]
            if last is not None and event.parent == last:
                _, hashes, _, tokens, *_, extra = found[-1]
                hashes.append(_number(event.digest))
                tokens.extend(event.tokens)
                extra.append(keys)
            else:
                parent = None if event.parent is None else _number(event.parent)
                found.append(("BlockStored", [_number(event.digest)], parent, list(event.tokens), len(event.tokens),
                              None, _MEDIUM, None, [keys]))  # fmt: skip
            last = event.digest
            continue
        last = None
        if isinstance(event, BlockRemoved):
            if found and found[-1][0] == "BlockRemoved":
                found[-1][1].append(_number(event.digest))
            else:
                found.append(("BlockRemoved", [_number(event.digest)], _MEDIUM))
        else:
            assert isinstance(event, AllBlocksCleared)
            found.append(("AllBlocksCleared",))
    return found


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")

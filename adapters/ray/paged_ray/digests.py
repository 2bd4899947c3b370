"""Digests of prompts and blocks for a router: short, and they reveal no prompt. A replica's pool names blocks with a
secret key of its own. The digests here use the application's key, so that a router can compute the same digests from a
prompt's token ids and its salt.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b

from paged_core import BlockRemoved, BlockStored, CacheEvent, hookimpl
from paged_ray.placement import CacheChanges

_BYTES = 8
_KEPT = 20_000  # changes that a replica keeps; an older question gets the whole content


def chain(key: bytes, token_ids: Sequence[int], salt: str | None, block_size: int) -> list[int]:
    """The digests of a prompt's full blocks: 64 bits each, of a block and all before it. The block of the last token
    is left out, since that token is always computed.

    Args:
        key: the application's, up to 64 bytes.
        salt: what keeps the tenant apart from others.
    """
    parent, found = _first(salt), []
    content, size = array("q", token_ids).tobytes(), block_size * 8
    for end in range(size, (len(content) - 8) // size * size + 1, size):
        parent = blake2b(parent + content[end - size : end], digest_size=_BYTES, key=key).digest()
        found.append(_number(parent))
    return found


class DigestLog:
    """A plugin that follows an engine's prefix cache, and reports the changes since a router's last question. The
    engine's thread writes; any thread reads.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()
        self._names: dict[bytes, bytes] = {}  # the pool's digest -> ours
        self._changes: deque[tuple[bool, bytes]] = deque(maxlen=_KEPT)  # (whether it came, digest)
        self._last = 0

    @hookimpl
    def on_prefix_cache_changed(self, events: Sequence[CacheEvent]) -> None:
        with self._lock:
            for event in events:
                self._take_in(event)

    def since(self, last: int) -> CacheChanges:
        """The changes after change ``last``; or everything, if that is too old or from another process."""
        with self._lock:
            num_new = self._last - last
            if not 0 <= num_new <= len(self._changes) or last == 0:
                return CacheChanges(self._last, [_number(digest) for digest in self._names.values()], (), whole=True)
            state: dict[bytes, bool] = {}  # only the last state of each counts
            for came, digest in list(self._changes)[len(self._changes) - num_new :]:
                state[digest] = came
            stored = [_number(digest) for digest, came in state.items() if came]
            removed = [_number(digest) for digest, came in state.items() if not came]
            return CacheChanges(self._last, stored, removed)

    def _take_in(self, event: CacheEvent) -> None:
        if isinstance(event, BlockStored):
            parent = _first(event.salt) if event.parent is None else self._names.get(event.parent)
            if parent is not None:  # else it can't be found
                self._names[event.digest] = digest = _digest(self._key, parent, event.tokens)
                self._note(True, digest)
        elif isinstance(event, BlockRemoved):
            gone = self._names.pop(event.digest, None)
            if gone is not None:
                self._note(False, gone)
        else:
            for digest in self._names.values():
                self._note(False, digest)
            self._names.clear()

    def _note(self, came: bool, digest: bytes) -> None:
        self._changes.append((came, digest))
        self._last += 1


def _digest(key: bytes, parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_BYTES, key=key).digest()


def _first(salt: str | None) -> bytes:
    return b"" if salt is None else b"salt" + salt.encode()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")

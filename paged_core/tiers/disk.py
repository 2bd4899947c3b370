"""DiskTier: blocks in the slabs of a folder, written and read by two threads. No step waits for them."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from paged_core.scheduling.block_pool import BlockContent
from paged_core.tiers.folder import SlabFolder
from paged_core.tiers.slab import Shape, Slab, digest_of_salt
from paged_core.tiers.stats import TierStats, empty_counts
from paged_core.tiers.tier import Fetch, Piece
from paged_core.tiers.worker import JobThread

_log = logging.getLogger("paged_core")
_PIECE_BYTES = 4 << 20  # read at a time: it stays in a processor's cache until it is copied further
_MOST_PIECES = 32  # read, and not yet taken by the engine
_MOST_QUEUED_BYTES = 128 << 20  # evicted by the cache and not yet written; more is dropped
_LOOK_S = 2.0  # between two checks of what other processes have written and deleted
_TOUCH_S = 1.0  # between two marks that a slab was used
_STOP_S = 0.5  # for the current job of a thread


class DiskTier:
    """One engine's blocks in a folder, and those that it finds there.

    Args:
        folder: other processes may use it too.
        shape: the shape of this engine's blocks.

    Raises:
        ConfigError: the folder's limit has no room for two blocks.
    """

    def __init__(self, folder: SlabFolder, shape: Shape) -> None:
        self._folder, self._shape = folder, shape
        self._capacity = folder.slab_capacity(shape)
        self._counts = empty_counts()
        self._seconds_out = 0.0
        self._can_write = True
        self._temporary: list[Path] | None = None  # if it is a list: slabs of a model that no other process can have
        self._start_afresh()
        self._look()

    def _start_afresh(self) -> None:
        """Also called in a forked child, which has no threads and must not write into its parent's slab."""
        self._pid = os.getpid()
        # changed by the tier's threads, read by the engine's: single entries
        self._index: dict[bytes, tuple[Slab, int]] = {}
        self._slabs: dict[Path, Slab] = {}
        self._lock = threading.Lock()  # guards what both threads change together
        self._growing: Slab | None = None
        self._queued: dict[bytes, tuple[BlockContent, Tensor]] = {}  # blocks being written
        self._num_queued_bytes = 0
        self._free: SimpleQueue[Tensor] = SimpleQueue()  # memory of pieces that the engine has copied
        self._num_pieces = 0
        self._num_read_queued = 0  # blocks read from memory, which say nothing of the disk's speed
        self._looked = self._touched = 0.0
        self._reader, self._writer = JobThread("paged-kv-reader"), JobThread("paged-kv-writer")

    @property
    def key(self) -> bytes:
        return self._folder.key

    @property
    def wants_more(self) -> bool:
        return self._can_write

    @property
    def stats(self) -> TierStats:
        return TierStats("disk", len(self._index), self._seconds_out, **self._counts)

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def holds(self, digest: bytes) -> bool:
        if digest in self._index or digest in self._queued:
            return True
        if time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            self._check_fork()
            self._reader.do(self._look)
        return False

    def store(self, contents: Sequence[BlockContent], data: Tensor) -> None:
        self._check_fork()
        if not self._can_write or self._num_queued_bytes + data.numel() > _MOST_QUEUED_BYTES:
            self._counts["blocks_dropped"] += len(contents)
            return
        with self._lock:
            self._num_queued_bytes += data.numel()
            self._queued |= {content.digest: (content, row) for content, row in zip(contents, data, strict=True)}
        shape = self._shape
        self._writer.do(lambda: self._write(contents, data, shape))

    def fetch(self, contents: Sequence[BlockContent], arrived: threading.Event) -> Fetch:
        self._check_fork()
        fetch = Fetch(contents, arrived)
        self._reader.do(lambda: self._read(fetch))
        return fetch

    def give_back(self, piece: Piece) -> None:
        self._free.put(piece.data)

    def forget(self) -> None:
        self._check_fork()
        with self._lock:
            self._index.clear()
            self._slabs.clear()
            self._queued.clear()
            self._temporary = self._temporary or []
            # K/V computed from now on match no other process's: the weights are in no file.
            self._shape = replace(self._shape, fingerprint=secrets.token_hex(16))
            growing, self._growing = self._growing, None
        if growing is not None:
            growing.seal()

    def flush(self, timeout_s: float) -> bool:
        return self._writer.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        if self._pid != os.getpid():
            return
        self.flush(timeout_s)
        self._can_write = False
        self._writer.stop(_STOP_S)
        self._reader.stop(_STOP_S)
        if self._growing is not None:
            self._growing.seal()
        for path in self._temporary or ():
            path.unlink(missing_ok=True)
        self._index.clear()
        self._slabs.clear()

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            self._start_afresh()
            self._look()

    # ---- the writing thread --------------------------------------------------------------------------------------

    def _write(self, contents: Sequence[BlockContent], data: Tensor, shape: Shape) -> None:
        began = time.thread_time()
        try:
            for content, row in zip(contents, data, strict=True):
                self._write_block(content, row, shape)
        except OSError as error:
            self._can_write = False
            _log.warning("kv_disk_path (%s) can't be written: nothing more is kept there: %s", self._folder.path, error)
        finally:
            with self._lock:
                self._num_queued_bytes -= data.numel()
                for content in contents:
                    self._queued.pop(content.digest, None)
            self._seconds_out += time.thread_time() - began

    def _write_block(self, content: BlockContent, row: Tensor, shape: Shape) -> None:
        slab = self._slab_to_write(shape) if self._can_write and shape is self._shape else None
        if slab is None:
            self._counts["blocks_dropped"] += 1
            return
        salt = digest_of_salt(content.salt, self.key)
        place = slab.append(content.digest, salt, content.tokens, row.numpy())
        with self._lock:
            if shape is self._shape:
                self._index[content.digest] = (slab, place)
        self._counts["blocks_out"] += 1
        self._counts["bytes_out"] += row.numel()

    def _slab_to_write(self, shape: Shape) -> Slab | None:
        slab = self._growing
        if slab is not None and not slab.full:
            return slab
        if slab is not None:
            slab.seal()
        self._growing = slab = self._folder.create(shape, self._capacity)
        self._drop_deleted()
        if slab is not None:
            with self._lock:
                self._slabs[slab.path] = slab
                if self._temporary is not None:
                    self._temporary.append(slab.path)
        return slab

    # ---- the reading thread --------------------------------------------------------------------------------------

    def _read(self, fetch: Fetch) -> None:
        step = max(1, _PIECE_BYTES // self._shape.block_bytes)
        for start in range(0, len(fetch.contents), step):
            places = range(start, min(start + step, len(fetch.contents)))
            memory = self._memory(step, fetch)
            if memory is None:
                break
            num_queued, began = self._num_read_queued, time.perf_counter()
            good = [self._read_block(fetch.contents[i], memory[i - start]) for i in places]
            busy_s = time.perf_counter() - began if self._num_read_queued == num_queued else 0.0
            fetch.put(Piece(places, memory, good, busy_s))
        fetch.finish()

    def _read_block(self, content: BlockContent, row: Tensor) -> bool:
        good = self._read_queued(content, row) or self._read_written(content, row)
        if good:
            self._counts["blocks_in"] += 1
            self._counts["bytes_in"] += row.numel()
        else:
            self._counts["blocks_lost"] += 1
            self._index.pop(content.digest, None)
        return good

    def _read_queued(self, content: BlockContent, row: Tensor) -> bool:
        queued = self._queued.get(content.digest)
        if queued is None or queued[0][1:] != content[1:]:
            return False
        row.copy_(queued[1])
        self._num_read_queued += 1
        return True

    def _read_written(self, content: BlockContent, row: Tensor) -> bool:
        found = self._index.get(content.digest)
        if found is None:
            return False
        slab, place = found
        good = False
        try:
            salt = digest_of_salt(content.salt, self.key)
            good = slab.read(place, content.digest, salt, content.tokens, row.numpy())
            self._touch(slab)
        except OSError as error:
            _log.debug("%s can't be read: %s", slab.path, error)
        return good

    def _memory(self, num_blocks: int, fetch: Fetch) -> Tensor | None:
        """Return memory for a piece, or None if the fetch was cancelled."""
        while not fetch.cancelled:
            try:
                return self._free.get(self._num_pieces >= _MOST_PIECES, 0.05)
            except Empty:
                if self._num_pieces < _MOST_PIECES:
                    self._num_pieces += 1
                    return torch.empty(num_blocks, self._shape.block_bytes, dtype=torch.uint8)
        return None

    def _touch(self, slab: Slab) -> None:
        if time.monotonic() - self._touched > _TOUCH_S:
            self._touched = time.monotonic()
            slab.touch()

    def _look(self) -> None:
        """Take in slabs that other processes have written or deleted since the last look."""
        self._looked = time.monotonic()
        self._drop_deleted()
        try:
            shape = self._shape
            for path in self._folder.paths(shape):
                self._look_into(path, shape)
        except OSError as error:
            _log.debug("%s can't be read: %s", self._folder.path, error)

    def _look_into(self, path: Path, shape: Shape) -> None:
        slab = self._slabs.get(path)
        if slab is not None and slab.num_written:
            return  # it is a slab of our own
        try:
            slab = slab or Slab.open(path, shape)
            if slab is None:
                return
            found = list(slab.scan())
        except OSError as error:
            _log.debug("%s can't be read: %s", path, error)
            return
        with self._lock:
            if shape is self._shape:
                self._slabs[path] = slab
                for place, digest in found:
                    self._index.setdefault(digest, (slab, place))

    def _drop_deleted(self) -> None:
        """Close slabs that were evicted: they use room on the disk as long as we hold them open."""
        with self._lock:
            gone = [slab for slab in self._slabs.values() if slab.gone]
            for slab in gone:
                del self._slabs[slab.path]
            if gone:
                self._index = {digest: at for digest, at in self._index.items() if at[0] not in gone}

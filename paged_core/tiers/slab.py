"""A slab: one file of many blocks, filled from the front and never overwritten.

====================  ==============================================================================
bytes                 what
====================  ==============================================================================
0 .. 4095             head: magic, the slab's fingerprint, sizes, a checksum of these
4096 ..               records, one for each block: its entry, then its bytes
====================  ==============================================================================

A record is written, and read, at once. Its entry has a checksum of itself and one of the block, so that torn, cut or
changed records are noticed. A process that writes a slab holds a lock on the file until the slab is full. This file
does not know what digests mean, nor other slabs.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

_MAGIC = b"pagedkv2"
_HEAD = struct.Struct("<8s16sQIII")  # magic, fingerprint, block_bytes, block_size, capacity, checksum
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Shape:
    """The facts that all blocks of an engine share."""

    fingerprint: str  # 32 hexadecimal digits, of the model and the cache's layout
    block_bytes: int
    block_size: int  # tokens

    @property
    def entry(self) -> struct.Struct:
        """The layout of an entry: digest, salt's digest, number of tokens, tokens, checksum of the block. A checksum of
        all these follows."""
        return struct.Struct(f"<16s16sI{self.block_size}qI")

    @property
    def entry_bytes(self) -> int:
        return self.entry.size + 4

    @property
    def record_bytes(self) -> int:
        return self.entry_bytes + self.block_bytes

    def offset(self, place: int) -> int:
        """Return the offset of a record in the file. The offset of the capacity is the size of a full slab."""
        return _HEAD_BYTES + place * self.record_bytes

    def capacity(self, num_bytes: int) -> int:
        """Return how many blocks fit into a slab of so many bytes."""
        return max(0, (num_bytes - _HEAD_BYTES) // self.record_bytes)


@dataclass(frozen=True)
class Entry:
    """The entry of one block."""

    digest: bytes
    salt_digest: bytes
    tokens: tuple[int, ...]
    checksum: int  # of the block's bytes

    def packed(self, shape: Shape) -> bytes:
        tokens = (*self.tokens, *[0] * (shape.block_size - len(self.tokens)))
        told = shape.entry.pack(self.digest, self.salt_digest, len(self.tokens), *tokens, self.checksum)
        return told + struct.pack("<I", crc32(told))


class Slab:
    """A slab in a file. Reading raises OSError if the file can't be read; damaged records are left out."""

    def __init__(self, path: Path, file: int, shape: Shape, capacity: int, num_written: int) -> None:
        self.path = path
        self.num_written = num_written  # blocks; in another process's slab, those seen so far
        self.capacity = capacity
        self._file = file
        self._shape = shape
        self._num_scanned = 0
        # not closed earlier, because a thread may be reading it when it is dropped
        weakref.finalize(self, os.close, file)

    @classmethod
    def create(cls, path: Path, shape: Shape, capacity: int) -> Slab:
        """Make a new slab, locked, for this process to write."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(file, _head(shape, capacity), 0)
            os.ftruncate(file, _HEAD_BYTES)
        except BaseException:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        return cls(path, file, shape, capacity, 0)

    @classmethod
    def open(cls, path: Path, shape: Shape) -> Slab | None:
        """Open an existing slab for reading. Returns None if it is not of this shape, or if its head is damaged."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        capacity = _capacity_in(os.pread(file, _HEAD.size, 0), shape)
        if capacity is None:
            os.close(file)
            return None
        return cls(path, file, shape, capacity, 0)

    # ---- writing -------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        return self.num_written >= self.capacity

    def append(self, digest: bytes, salt_digest: bytes, tokens: tuple[int, ...], data: Any) -> int:
        """Write a block with the bytes ``data``. Returns its place.

        Raises:
            OSError: the block can't be written, and is not in the slab.
        """
        place = self.num_written
        entry = Entry(digest, salt_digest, tokens, crc32(data)).packed(self._shape)
        _write(self._file, entry, memoryview(data).cast("B"), self._shape.offset(place))
        self.num_written += 1
        return place

    def seal(self) -> None:
        """Release the lock, because nothing more will be written."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    # ---- reading -------------------------------------------------------------------------------------------------

    def scan(self) -> Iterator[tuple[int, bytes]]:
        """Yield (place, digest) of every valid entry written since the last call."""
        size = os.fstat(self._file).st_size
        num = min((size - _HEAD_BYTES) // self._shape.record_bytes, self.capacity)
        for place in range(self._num_scanned, num):
            entry = self._parse(os.pread(self._file, self._shape.entry_bytes, self._shape.offset(place)))
            if entry is not None:
                yield place, entry.digest
        self._num_scanned = max(num, self._num_scanned)

    def read(self, place: int, digest: bytes, salt_digest: bytes, tokens: tuple[int, ...], into: Any) -> bool:
        """Fill ``into``, a buffer of ``block_bytes``, with the block at ``place``. Returns False if that is another
        block, or is damaged."""
        told = bytearray(self._shape.entry_bytes)
        if os.preadv(self._file, [told, into], self._shape.offset(place)) != self._shape.record_bytes:
            return False
        entry = self._parse(told)
        if entry is None or (entry.digest, entry.salt_digest, entry.tokens) != (digest, salt_digest, tokens):
            return False
        return crc32(into) == entry.checksum

    def _parse(self, told: bytes | bytearray) -> Entry | None:
        if len(told) < self._shape.entry_bytes or crc32(told[:-4]) != int.from_bytes(told[-4:], "little"):
            return None
        digest, salt_digest, num_tokens, *tokens, checksum = self._shape.entry.unpack(told[:-4])
        return Entry(digest, salt_digest, tuple(tokens[:num_tokens]), checksum)

    # ---- the file ------------------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether a process has deleted the file."""
        return os.fstat(self._file).st_nlink == 0

    def touch(self) -> None:
        """Mark the slab as used just now, for eviction."""
        os.utime(self._file)


def size_when_full(path: Path) -> int:
    """Return the bytes that a slab's file will take on the disk when it is full; its writer may still be at work."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            head = os.pread(file, _HEAD.size, 0)
            if len(head) == _HEAD.size and head.startswith(_MAGIC):
                _, _, block_bytes, block_size, capacity, _ = _HEAD.unpack(head)
                size = max(size, Shape("", block_bytes, block_size).offset(capacity))
        return size
    finally:
        os.close(file)


def in_use(path: Path) -> bool:
    """Return whether a process is writing the slab now."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def digest_of_salt(salt: str | None, key: bytes) -> bytes:
    """Return what stands for a salt in files, from which the salt can't be learned."""
    return blake2b((salt or "").encode(), digest_size=16, key=key, person=b"salt").digest()


def _head(shape: Shape, capacity: int) -> bytes:
    told = _HEAD.pack(_MAGIC, bytes.fromhex(shape.fingerprint), shape.block_bytes, shape.block_size, capacity, 0)[:-4]
    return told + struct.pack("<I", crc32(told))


def _capacity_in(head: bytes, shape: Shape) -> int | None:
    if len(head) < _HEAD.size:
        return None
    capacity = int(_HEAD.unpack(head)[4])
    return capacity if head == _head(shape, capacity) else None


def _write(file: int, entry: bytes, data: memoryview, offset: int) -> None:
    """Write all of both. A single call may write only a part, on a full disk for example."""
    num = os.pwritev(file, [entry, data], offset)
    if num < len(entry) + len(data):
        left = memoryview(entry + bytes(data))
        while num < len(left):
            num += os.pwrite(file, left[num:], offset + num)

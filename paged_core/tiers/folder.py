"""A folder of slabs that several processes share: each writes slabs of its own and reads all of its shape.

What the slabs take together stays below a limit: before a new one is made, those that were of use longest ago are
deleted, whoever wrote them, for whatever model. A process that was killed leaves a slab that counts like any other.
This file knows names, sizes and times of files. It does not know what is in them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paged_core.errors import ConfigError
from paged_core.tiers.slab import Shape, Slab, in_use, size_when_full

_KEY, _LOCK, _SUFFIX = "key", "lock", ".kv"
_KEY_BYTES = 32
_MOST_SLAB_BYTES = 256 << 20
_SLABS = 16  # at least, in a folder that is full


class SlabFolder:
    """``path`` with slabs of at most ``max_bytes`` together.

    Raises:
        ConfigError: the folder can't be used: it is somebody else's, say, or can be read by others.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = Path(path).expanduser().absolute()
        self.max_bytes = max_bytes
        try:
            self._prepare()
            self.key = self._read_key()
        except OSError as error:
            raise ConfigError(f"kv_disk_path ({self.path}) can't be used: {error}") from error

    def slab_capacity(self, shape: Shape) -> int:
        """Blocks of a new slab.

        Raises:
            ConfigError: the limit has no room for two slabs of one block.
        """
        capacity = shape.capacity(min(self.max_bytes // _SLABS, _MOST_SLAB_BYTES))
        if capacity < 1 and 2 * shape.offset(1) > self.max_bytes:
            raise ConfigError(
                f"kv_disk_bytes ({self.max_bytes}) has no room for two files of one block, {shape.offset(1)} "
                "bytes each; raise it"
            )
        return max(1, capacity)

    def create(self, shape: Shape, capacity: int) -> Slab | None:
        """A new slab for this process to write; others are deleted to make room. None: there is no room, since other
        processes are writing all there is.

        Raises:
            OSError: the folder can't be written.
        """
        path = self.path / f"{shape.fingerprint}.{secrets.token_hex(8)}{_SUFFIX}"
        with self._locked():
            if not self._make_room(shape.offset(capacity)):
                return None
            return Slab.create(path, shape, capacity)

    def paths(self, shape: Shape) -> list[Path]:
        """Slabs that say they are of this shape, first the one that was of use longest ago."""
        return [path for path in self._all() if path.name.startswith(f"{shape.fingerprint}.")]

    def _make_room(self, num_bytes: int) -> bool:
        sizes = {path: size_when_full(path) for path in self._all()}
        total = sum(sizes.values()) + num_bytes
        for path, size in sizes.items():
            if total <= self.max_bytes:
                break
            if not in_use(path):
                path.unlink(missing_ok=True)
                total -= size
        return total <= self.max_bytes

    def _all(self) -> list[Path]:
        """Of use longest ago first."""
        times = {}
        for entry in os.scandir(self.path):
            if entry.name.endswith(_SUFFIX):
                with suppress(FileNotFoundError):  # evicted a moment ago
                    times[Path(entry.path)] = entry.stat().st_mtime_ns
        return sorted(times, key=lambda path: (times[path], path.name))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time makes room."""
        file = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    # ---- the folder itself ---------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """There, and for nobody else to read: K/V tell what prompts said."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = self.path.stat().st_mode
        if not stat.S_IMODE(mode) & 0o077:
            return
        if any(self.path.iterdir()) and not (self.path / _KEY).exists():
            raise ConfigError(
                f"kv_disk_path ({self.path}) can be read by others (mode {stat.S_IMODE(mode):o}), and what is in it "
                "isn't ours; name a folder that is empty or isn't there yet"
            )
        self.path.chmod(0o700)

    def _read_key(self) -> bytes:
        """The folder's secret, made by who comes first."""
        path = self.path / _KEY
        if not path.exists():
            fresh = self.path / f"{_KEY}.{secrets.token_hex(8)}"
            fresh.write_bytes(secrets.token_bytes(_KEY_BYTES))
            fresh.chmod(0o600)
            with suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"{path} is damaged; delete the folder, and it is made anew")
        return key

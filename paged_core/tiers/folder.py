"""A folder of slabs that several processes share. Each writes its own slabs, and reads all slabs of its shape.

Together the slabs stay below a limit. Before a new one is made, the least recently used slabs are deleted, whichever
process wrote them, for whichever model. A killed process leaves a slab that counts like any other. This file knows
names, sizes and times of files. It does not know what is in them.
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
_SLABS = 16  # in a full folder, at least


class SlabFolder:
    """The folder ``path``, with slabs of at most ``max_bytes`` together.

    Raises:
        ConfigError: the folder can't be used: for example, it is another user's, or others can read it.
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
        """Return the number of blocks of a new slab.

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
        """Return a new slab for this process to write; other slabs are deleted to make room. Returns None if there is
        no room, because other processes are writing all slabs.

        Raises:
            OSError: the folder can't be written.
        """
        path = self.path / f"{shape.fingerprint}.{secrets.token_hex(8)}{_SUFFIX}"
        with self._locked():
            if not self._make_room(shape.offset(capacity)):
                return None
            return Slab.create(path, shape, capacity)

    def paths(self, shape: Shape) -> list[Path]:
        """Return the slabs whose names are of this shape, least recently used first."""
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
        """Return all slabs, least recently used first."""
        times = {}
        for entry in os.scandir(self.path):
            if entry.name.endswith(_SUFFIX):
                with suppress(FileNotFoundError):  # it was evicted a moment ago
                    times[Path(entry.path)] = entry.stat().st_mtime_ns
        return sorted(times, key=lambda path: (times[path], path.name))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let only one process at a time make room."""
        file = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    # ---- the folder itself ---------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the folder, readable by its owner only, because K/V reveal prompts."""
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
        """Return the folder's secret key. The first process makes it."""
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

"""Runs a native function on torch's own OpenMP threads, and compiles such functions once for this host.

A kernel is ``void kernel(void *args)``. Every thread of a launch calls it with the same address, and the threads divide
the work by counters at that address. torch's thread pool is used, because a second pool would compete with it for the
cores. If torch brings no GNU OpenMP (macOS, Windows), the calling thread does all the work, which is slower, with the
same results.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import pickle
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types
from numba.core import bytecode, ccallback
from platformdirs import user_cache_path

from paged_kernels.cpu.recording import ArgumentLayout, recording

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 180.0  # seconds to wait for another process that compiles the same kernel


class Kernel:
    """A numba function of one int64 address, compiled when it is first needed and cached on disk."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self.name = function.__name__.strip("_")

    @property
    def is_compiled(self) -> bool:
        return "_pointer" in self.__dict__

    def compile(self) -> None:
        """Compile it, or load it from disk, now."""
        with self._lock:
            _ = self._pointer

    @cached_property
    def _pointer(self) -> int:
        return _compile(self._function)

    def __call__(self, args: int, num_threads: int, layout: ArgumentLayout | None = None, alone: bool = False) -> None:
        """Run on up to ``num_threads`` threads, including this one, or only on this one (``alone``). Returns when all
        are done. ``layout``: for a Recorder of this thread."""
        if not self.is_compiled:
            self.compile()
        if recording.recorder is not None:
            recording.recorder.add(self._pointer, args, num_threads, layout)
        _launch(self._pointer, args, 1 if alone else num_threads, 0)

    def here(self, args: int) -> None:
        """Run on this thread only."""
        if not self.is_compiled:
            self.compile()
        self._native(args)

    @cached_property
    def _native(self) -> Callable[[int], None]:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._pointer)


def kernel(function: Callable[[int], None]) -> Kernel:
    return Kernel(function)


def _find_launcher() -> Callable[[int, int, int, int], None]:
    """Return GOMP_parallel(function, data, num_threads, flags) of the libgomp that torch has loaded, or a function that
    uses the calling thread."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            launch = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        launch.restype = None
        return launch

    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def alone(function: int, data: int, num_threads: int, flags: int) -> None:
        call(function)(data)

    return alone


def launcher_address() -> int:
    """Return GOMP_parallel's address, or 0 if the calling thread does all the work."""
    return (ctypes.cast(_launch, ctypes.c_void_p).value or 0) if _is_native(_launch) else 0  # type: ignore[arg-type]


def _is_native(launch: Callable[..., None]) -> bool:
    return hasattr(launch, "argtypes")  # functions of ctypes have it


def _compile(function: Callable[[int], None]) -> int:
    try:
        return _compile_with(function, _disk_cache(function))
    except (OSError, EOFError, pickle.UnpicklingError):  # on a full disk or with a damaged file, nothing is cached
        return _compile_with(function, None)


def _compile_with(function: Callable[[int], None], cache: Any) -> int:
    signature = types.void(types.int64)
    compiled: Any = ccallback.CFunc(function, (signature.args, signature.return_type), {}, {"error_model": "numpy"})
    if cache is not None:
        compiled._cache = cache
    with _alone(None if cache is None else Path(cache.cache_path) / f"{function.__module__}.{function.__name__}.lock"):
        compiled.compile()
    return int(compiled.address)


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Keep other processes out of the ``with`` block, for at most _PATIENCE seconds: of several that start together,
    one compiles, and the others load."""
    if file is None or fcntl is None:
        yield
        return
    with file.open("a") as held:  # closing the file releases the lock, even if the process is killed
        give_up = time.monotonic() + _PATIENCE
        while time.monotonic() < give_up:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield


def _disk_cache(function: Callable[[int], None]) -> Any:
    """Return numba's own cache with our folder, or None if no folder can be written."""
    from numba.core import caching

    folder = cache_folder()
    if folder is None:
        return None

    stamp = folder.name  # names everything that the code depends on

    class Locator(caching._CacheLocator):  # type: ignore[misc]
        def get_cache_path(self) -> str:
            return str(folder)

        def get_source_stamp(self) -> str:
            return stamp

        def get_disambiguator(self) -> str:
            return ""

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return cls()

    class Impl(caching.CompileResultCacheImpl):  # type: ignore[misc]
        _locator_classes = (Locator,)

    class Cache(caching.FunctionCache):  # type: ignore[misc]
        _impl_class = Impl

    return Cache(function)


def _read_sources() -> str:
    """Return a digest of everything that compiled code depends on, except the processor, which is in numba's own
    key."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version_info[:2]}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path | None:
    """Return the folder of compiled kernels, whose name contains everything that their code depends on.
    PAGED_CORE_CACHE sets its parent."""
    for parent in _cache_parents():
        folder = parent / "kernels" / _DIGEST
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            if _is_ours(parent):
                with tempfile.TemporaryFile(dir=folder):
                    return folder
        except OSError:
            continue
    return None


def _is_ours(folder: Path) -> bool:
    """Return whether no other user can have put code there."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _cache_parents() -> list[Path]:
    if chosen := os.environ.get("PAGED_CORE_CACHE"):
        return [Path(chosen)]
    whose = os.getuid() if hasattr(os, "getuid") else "user"
    return [user_cache_path("paged-core", appauthor=False), Path(tempfile.gettempdir()) / f"paged-core-{whose}"]


# numba names a function by its Python name and a number that counts up from 1 in each process, and loaded code calls
# functions by name. Helpers of two kernels that two processes compiled and cached could be confused. So each process
# starts counting at a random number.
bytecode.FunctionIdentity._unique_ids = itertools.count(secrets.randbits(48))
# The sources are read when this process has just loaded them. If they were read after an upgrade of the package, the
# old code would be cached as the new one's.
_DIGEST = _read_sources()
_launch = _find_launcher()

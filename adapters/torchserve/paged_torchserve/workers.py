"""Ensures that a model has one worker, and tells whether it had another before.

TorchServe 0.12.0 lets an idle worker hold its model's lock until there is a request for it (Model.pollInferJob): a
second worker would stop the first in the middle of its answers. TorchServe tells no worker about the others, so a lock
on a file that all workers of a model know ensures it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from pathlib import Path

from paged_core import ConfigError

_PARTING_S = 5.0  # for a replaced worker to end
_INHERITANCE_S = 10.0  # within which a new worker gets the requests of the one before
_SECOND = (
    "another worker serves this model, and with two of them TorchServe's continuous batching would stop: one worker "
    "serves all requests. Say min_worker=1 and max_worker=1, in snapshots too; for more GPUs, replicas in section paged"
)


class OnlyWorker:
    """Held until the process ends, in any way.

    Raises:
        ConfigError: this model of this TorchServe has a worker already.
    """

    def __init__(self, model_dir: Path, patience_s: float = _PARTING_S) -> None:
        name = f"{_frontend()}:{model_dir.resolve()}"
        path = Path(tempfile.gettempdir()) / f".paged-worker.{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        self._is_first = not path.exists()
        self._began: float | None = None  # when it was first asked
        self._file = path.open("a")
        until = time.monotonic() + patience_s
        while not self._is_locked():
            if time.monotonic() > until:
                self._file.close()
                raise ConfigError(_SECOND)
            time.sleep(0.1)

    @property
    def may_inherit(self) -> bool:
        """Whether present requests may come from an earlier worker: true for a while after the first call."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        return not self._is_first and now - self._began < _INHERITANCE_S

    def close(self) -> None:
        self._file.close()

    def _is_locked(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no child of ours inherits
        except OSError:
            return False
        return True


def _frontend() -> int:
    """The process of TorchServe that this worker belongs to; a launcher may stand between."""
    import psutil

    parents = psutil.Process().parents()
    java = [each.pid for each in parents if "java" in each.name()]
    return java[0] if java else os.getppid()

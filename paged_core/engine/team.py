"""Team: rank 0 and the processes of the other ranks, from before the model is loaded until the engine is closed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paged_core.config import EngineConfig
from paged_core.errors import ConfigError
from paged_core.execution.kv_cache import KVCache
from paged_core.execution.model import AttentionBackend, PagedModel
from paged_core.execution.model_runner import ModelRunner
from paged_core.plugins import Plugins
from paged_core.ranks import ranks as together
from paged_core.ranks.leading import LeadingRunner
from paged_core.ranks.processes import RankProcesses
from paged_core.ranks.ranks import Ranks

_COMPUTING = frozenset({"load_model", "create_kv_cache", "create_attention_backend", "create_module_forward"})


MakeRunner = Callable[[PagedModel, AttentionBackend, KVCache], ModelRunner]


class EngineArgs(NamedTuple):
    """The arguments of an Engine, as its user gave them."""

    model: Any
    config: EngineConfig
    device: str | None
    dtype: str | None


class RankArgs(NamedTuple):
    """What another rank is sent at its start. It can be pickled."""

    rank: int
    asked: EngineArgs
    store: Path
    num_threads: int  # of torch, in each rank
    leader: int  # id of rank 0's process, which this rank must not outlive


class Team:
    """Starts the processes when it is made.

    Raises:
        ConfigError: the model, or something else in the arguments, does not work on several ranks.
    """

    def __init__(self, manager: Plugins, asked: EngineArgs) -> None:
        _check(manager, asked)
        size = asked.config.tensor_parallel_size
        asked = asked._replace(model=os.fspath(asked.model))
        self._folder = Path(tempfile.mkdtemp(prefix="paged-ranks-"))  # only this user can read it
        store = self._folder / "store"
        self._threads = torch.get_num_threads()
        share = max(1, self._threads // size)
        torch.set_num_threads(share)
        self.others = RankProcesses(
            size, lambda rank: RankArgs(rank, asked, store, share, os.getpid()), on_death=together.abort
        )
        self.ranks = Ranks(0, size, store, self.others.wait_until_ready)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Use this around everything that is built together with the other ranks. If it fails, they are ended."""
        try:
            with together.on_loopback():
                yield
        except Exception as error:
            told = self.others.failed(error)
            self.close()
            if told is error:
                raise
            raise told from error
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # all ranks have found one another

    def runner(self, model: PagedModel, backend: AttentionBackend, cache: KVCache) -> LeadingRunner:
        return LeadingRunner(model, backend, cache, self.others, self.close)

    def close(self) -> None:
        """End the other ranks. May be called again."""
        self.others.end()
        self.ranks.leave()
        if self._threads:
            torch.set_num_threads(self._threads)
            self._threads = 0


def _check(manager: Plugins, asked: EngineArgs) -> None:
    size = asked.config.tensor_parallel_size
    if not isinstance(asked.model, str | os.PathLike):
        raise ConfigError(
            f"tensor_parallel_size is {size}, and the model given is an object that only this process has; give the "
            "folder or hub id that every rank can load its shard from (model.save_pretrained(FOLDER) makes one)"
        )
    if asked.device is not None and ":" in asked.device:
        raise ConfigError(
            f"device is {asked.device!r}, one device, and tensor_parallel_size is {size}; say "
            f"{asked.device.split(':')[0]!r}: rank 0 takes the first, rank 1 the second, and so on"
        )
    for plugin in manager.given:
        hooks = {caller.name for caller in manager.get_hookcallers(plugin) or ()} & _COMPUTING
        if hooks:
            raise ConfigError(
                f"plugin {manager.get_name(plugin)!r} brings {', '.join(sorted(hooks))}, which the other ranks would "
                "lack; install it as an entry point of the group paged_core, or leave tensor_parallel_size out"
            )
    obstacle = together.obstacle()
    if obstacle is not None:
        raise ConfigError(obstacle)

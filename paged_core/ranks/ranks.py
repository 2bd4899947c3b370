"""Ranks: what the processes of one model compute together, over torch.distributed: gloo on CPUs, nccl on GPUs.

This file knows tensors. It starts no process and knows no model.
"""

from __future__ import annotations

import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BACKENDS = {"cuda": "nccl"}  # by type of device; gloo elsewhere
_PATIENCE = timedelta(hours=2)  # for a rank that still loads; one that has died is told by its connection
_LOOPBACK = ("lo", "lo0")
_INTERFACE = "GLOO_SOCKET_IFNAME"


class Ranks:
    """One rank among ``size``. All of them make the same calls in the same order.

    Args:
        rank: 0 is the one that decides and samples.
        store: a file that all ranks can reach and nobody else, where they find one another.
        ready: called before the others are waited for.
    """

    def __init__(self, rank: int, size: int, store: Path, ready: Callable[[], None]) -> None:
        self.rank, self.size = rank, size
        self._store, self._ready = store, ready
        self._device = torch.device("cpu")
        self._silent = False
        self._parting: weakref.finalize[[int], Ranks] | None = None

    def join(self, device: torch.device) -> None:
        """Wait until every rank is here. Called by whoever loads the model, once it is known that it can be split.
        ``device``: where this rank computes."""
        self._ready()
        self._device = device
        hook, store = sys.excepthook, dist.FileStore(str(self._store), self.size)  # type: ignore[attr-defined]
        dist.init_process_group(
            _BACKENDS.get(device.type, "gloo"),
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        sys.excepthook = hook  # torch's would mark every line of this program's tracebacks with its rank
        self._parting = weakref.finalize(self, _part, os.getpid())

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, in its place if it is contiguous: the same bits on all ranks."""
        x = x.contiguous()
        if not self._silent:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        """``x [..., own] -> [..., width]``: all ranks' columns side by side. Each has ``ceil(width / size)``, the last
        ones what is left."""
        part = -(-width // self.size)
        own = torch.nn.functional.pad(x, (0, part - x.shape[-1])).reshape(-1, part)  # [N, part]
        every = own.new_zeros(self.size * len(own), part)
        if not self._silent:
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until 2.13
            all_gather(every, own.contiguous())
        columns = every.view(self.size, len(own), part).movedim(0, 1).reshape(*x.shape[:-1], self.size * part)
        return columns[..., :width]

    def own_columns(self, x: Tensor) -> Tensor:
        """``x [..., width] -> [..., own]``: those that ``gather`` would take from this rank."""
        part = -(-x.shape[-1] // self.size)
        return x[..., self.rank * part : (self.rank + 1) * part]

    def least(self, value: int) -> int:
        """The smallest of every rank's ``value``."""
        if self.size == 1:
            return value
        least = torch.tensor([value], device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def agree(self, value: Any) -> Any:
        """Rank 0's ``value``, which can be pickled."""
        if self.size == 1:
            return value
        agreed = [value]
        dist.broadcast_object_list(agreed, src=0, device=self._device)
        return agreed[0]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, sums and columns stay this rank's own and nobody waits for anybody: for trials of modules, which may
        be more on one rank than on another."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def leave(self) -> None:
        """Part from the others, if they were joined. Nobody is waited for. May be repeated."""
        if self._parting is not None:
            self._parting()


ALONE = Ranks(0, 1, Path(), lambda: None)
"""One process that has the whole model."""


def _part(process: int) -> None:
    if dist.is_initialized() and os.getpid() == process:  # a forked child has nobody to part from
        dist.destroy_process_group()


def obstacle() -> str | None:
    """Why ranks can't be joined in this process; None: they can."""
    if not dist.is_available():
        return (
            f"this torch ({torch.__version__}) was built without torch.distributed; leave tensor_parallel_size out, or "
            "install a build that has it"
        )
    if dist.is_initialized():
        return (
            f"torch.distributed is in use in this process already (by {dist.get_world_size()} ranks: torchrun, or "
            "another engine); close that, or start this engine in a process of its own, without torchrun"
        )
    return None


def abort() -> None:
    """Have calls that wait for another rank fail, from another thread. gloo's fail by themselves when one dies."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


@contextmanager
def on_loopback() -> Iterator[None]:
    """Inside, gloo's connections are made within this machine, unless the user has named an interface."""
    known = {name for _, name in socket.if_nameindex()} if hasattr(socket, "if_nameindex") else set()
    loopback = next((name for name in _LOOPBACK if name in known), None)
    if loopback is None or _INTERFACE in os.environ:
        yield
        return
    os.environ[_INTERFACE] = loopback
    try:
        yield
    finally:
        del os.environ[_INTERFACE]

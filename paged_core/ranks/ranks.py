"""Ranks: communication between the processes of one model, through torch.distributed: gloo on CPUs, nccl on GPUs.

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
_PATIENCE = timedelta(hours=2)  # for a rank that is still loading; a dead one is noticed by its connection
_LOOPBACK = ("lo", "lo0")
_INTERFACE = "GLOO_SOCKET_IFNAME"


class Ranks:
    """One rank of ``size``. All ranks make the same calls in the same order.

    Args:
        rank: this process's number; rank 0 decides and samples.
        store: a file that only the ranks can reach, through which they find one another.
        ready: called before this rank waits for the others.
    """

    def __init__(self, rank: int, size: int, store: Path, ready: Callable[[], None]) -> None:
        self.rank, self.size = rank, size
        self._store, self._ready = store, ready
        self._device = torch.device("cpu")
        self._silent = False
        self._parting: weakref.finalize[[int], Ranks] | None = None

    def join(self, device: torch.device) -> None:
        """Wait until every rank has joined. The plugin that loads the model calls this, once it knows that the model
        can be split. ``device``: where this rank computes."""
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
        sys.excepthook = hook  # torch's hook would put the rank before every line of this program's tracebacks
        self._parting = weakref.finalize(self, _part, os.getpid())

    def add_up(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``, the same bits on all ranks. It overwrites ``x`` if that is
        contiguous."""
        x = x.contiguous()
        if not self._silent:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        """Gather ``x [..., own] -> [..., width]``: all ranks' columns side by side. Each rank has ``ceil(width /
        size)`` of them, the last ranks fewer or none."""
        part = -(-width // self.size)
        own = torch.nn.functional.pad(x, (0, part - x.shape[-1])).reshape(-1, part)  # [N, part]
        every = own.new_zeros(self.size * len(own), part)
        if not self._silent:
            # the name until torch 2.13
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            all_gather(every, own.contiguous())
        columns = every.view(self.size, len(own), part).movedim(0, 1).reshape(*x.shape[:-1], self.size * part)
        return columns[..., :width]

    def own_columns(self, x: Tensor) -> Tensor:
        """Return of ``x [..., width]`` the columns ``[..., own]`` that ``gather`` would take from this rank."""
        part = -(-x.shape[-1] // self.size)
        return x[..., self.rank * part : (self.rank + 1) * part]

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        if self.size == 1:
            return value
        least = torch.tensor([value], device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def agree(self, value: Any) -> Any:
        """Return rank 0's ``value`` on all ranks. It must be picklable."""
        if self.size == 1:
            return value
        agreed = [value]
        dist.broadcast_object_list(agreed, src=0, device=self._device)
        return agreed[0]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, sums and gathers use this rank's values only and wait for nothing. This is for trials of modules, of
        which one rank may make more than another."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def leave(self) -> None:
        """Leave the other ranks, if they were joined, without waiting for them. May be called again."""
        if self._parting is not None:
            self._parting()


ALONE = Ranks(0, 1, Path(), lambda: None)
"""A single process that holds the whole model."""


def _part(process: int) -> None:
    if dist.is_initialized() and os.getpid() == process:  # a forked child has not joined the ranks
        dist.destroy_process_group()


def obstacle() -> str | None:
    """Return why ranks can't be joined in this process, or None if they can."""
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
    """Make calls that wait for another rank fail. Called from another thread. gloo's calls fail by themselves when a
    rank dies."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()


@contextmanager
def on_loopback() -> Iterator[None]:
    """Inside, gloo connects within this machine only, unless the user has named a network interface."""
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

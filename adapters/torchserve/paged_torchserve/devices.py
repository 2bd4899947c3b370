"""The devices of a worker's engines: TorchServe gives a worker one GPU, and may have more."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from paged_core import ConfigError
from paged_torchserve.settings import SectionSettings

_log = logging.getLogger("paged_torchserve")


def choose_devices(gpu_id: int | None, gpu_ids: Sequence[int], settings: SectionSettings) -> list[str]:
    """One device per engine. ``gpu_id``: the GPU that TorchServe gave to this worker; ``gpu_ids``: all that it may
    give.

    Raises:
        ConfigError: there are several GPUs, and no setting says how many to use; or the settings contradict each other.
    """
    wanted, num_ranks = settings.replicas, settings.engine.tensor_parallel_size
    if num_ranks > 1 and (wanted or 1) > 1:
        raise ConfigError(
            f"tensor_parallel_size is {num_ranks} and replicas {wanted}; only one of them can be more than 1"
        )
    if settings.device is not None:
        if (wanted or 1) > 1 and settings.device != "cpu":
            raise ConfigError(f"replicas is {wanted} and device is {settings.device}; leave device out: each has a GPU")
        return [settings.device] * (wanted or 1)
    if num_ranks > 1:
        return ["auto"]  # each rank takes one
    if gpu_id is None:
        _tell_fewer(wanted, 1, "there is no GPU, and one engine uses all of a CPU")
        return ["cpu"]
    if wanted is None and len(gpu_ids) > 1:
        raise ConfigError(
            f"TorchServe gave GPU {gpu_id} to this worker, and there are {len(gpu_ids)}. One worker serves all: "
            f"say on how many GPUs, --set replicas={len(gpu_ids)} for all of them, --set replicas=1 for this one"
        )
    first = gpu_ids.index(gpu_id) if gpu_id in gpu_ids else 0
    chosen = [*gpu_ids[first:], *gpu_ids[:first]][: wanted or 1] or [gpu_id]
    _tell_fewer(wanted, len(chosen), "there are no more GPUs")
    return [f"cuda:{each}" for each in chosen]


def _tell_fewer(wanted: int | None, given: int, why: str) -> None:
    if (wanted or 1) > given:
        _log.warning("replicas is %s; there will be %s: %s", wanted, given, why)

"""The core's own tiers: host memory for a device's blocks, and a folder on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_core.errors import ConfigError
from paged_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from paged_core.config import EngineConfig
    from paged_core.execution.spec import ModelSpec
    from paged_core.tiers.disk import DiskTier
    from paged_core.tiers.host import HostTier
    from paged_core.tiers.tier import BlockLayout

_DISK_BYTES = 10 << 30  # if the config doesn't say


@hookimpl(specname="create_offload_tier")
def create_disk_tier(config: EngineConfig, layout: BlockLayout) -> DiskTier | None:
    """Return a folder's tier, if the config names a folder."""
    if config.kv_disk_path is None:
        return None
    from paged_core.tiers.disk import DiskTier
    from paged_core.tiers.folder import SlabFolder
    from paged_core.tiers.slab import Shape

    folder = SlabFolder(config.kv_disk_path, config.kv_disk_bytes or _DISK_BYTES)
    fingerprint = layout.fingerprint()
    if fingerprint is None:
        raise ConfigError(
            "kv_disk_path is set, but the model can't tell which one it is (it has no fingerprint, or hooks and "
            "forwards of your own): K/V on disk could be another's; leave kv_disk_path out"
        )
    return DiskTier(folder, Shape(fingerprint, layout.block_bytes, layout.block_size))


@hookimpl(specname="create_offload_tier", tryfirst=True)
def create_host_tier(spec: ModelSpec, config: EngineConfig, layout: BlockLayout) -> HostTier | None:
    """Return a tier in host memory, if the config asks for one. It comes before the disk."""
    if config.kv_host_bytes is None:
        return None
    if all(layer.device.type == "cpu" for layer in spec.layers):
        raise ConfigError(
            f"kv_host_bytes is {config.kv_host_bytes}, but the model is on the CPU, and its K/V are in the host's "
            "memory already; leave it out, and raise kv_cache_bytes"
        )
    from paged_core.tiers.host import HostTier

    pinned = any(layer.device.type == "cuda" for layer in spec.layers)
    return HostTier(config.kv_host_bytes, layout.block_bytes, pinned=pinned)

"""Makes model-config.yaml for our handler from another's, and lists the changes line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paged_core import ConfigError
from paged_torchserve.settings import SECTION, put, read_settings

# A delay of 0 lets TorchServe hand over only one new request a step; with 1 ms it hands over all waiting ones.
_OURS = {"minWorkers": 1, "maxWorkers": 1, "maxBatchDelay": 1, "continuousBatching": True}
_BATCH_SIZE = 64
_STARTUP_S = 600  # of TorchServe's own 120 the first start alone may take more: it compiles kernels
_NOT_WITH_US = ("asyncCommunication", "sequenceBatching", "useJobTicket", "torchrun", "pippy", "deepspeed", "tp",
                "micro_batching")  # fmt: skip
# Permissions that the old archive's author gave to code that comes with the weights: they must be granted again.
_RIGHTS = ("allow_pickle", "trust_remote_code")

_Pairs = Sequence[tuple[str, str]]


def configuration(
    old: Mapping[str, Any], model: str | None, translated: Mapping[str, Any], settings: _Pairs, allow_pickle: bool
) -> dict[str, Any]:
    """``translated``: the old handler's own section as our settings; ``settings``: the new settings.

    Raises:
        ConfigError: a setting is wrong.
    """
    kept = {key: value for key, value in old.items() if key not in _NOT_WITH_US}
    if kept.get("parallelType", "custom") != "custom":
        del kept["parallelType"]
    size = old.get("batchSize")
    config: dict[str, Any] = {
        "startupTimeout": _STARTUP_S,
        **kept,
        **_OURS,
        "batchSize": max(_BATCH_SIZE, size if isinstance(size, int) else 1),
    }
    section = {**_replicas(old), **translated}
    section |= {key: value for key, value in _section(old).items() if key not in _RIGHTS}
    if model is not None:
        section["model"] = model
    if allow_pickle:
        section["allow_pickle"] = True
    config.pop(SECTION, None)
    if section:
        config[SECTION] = section
    for key, text in settings:
        put(config, key, text)
    read_settings(config)
    return config


def _replicas(old: Mapping[str, Any]) -> dict[str, int]:
    """The number of engines: the old maximum or minimum of workers, each of which had its own GPU if there was one. An
    archive of ours has it in its section."""
    if SECTION in old or old.get("continuousBatching"):
        return {}
    counts = [count for count in (old.get("maxWorkers"), old.get("minWorkers")) if isinstance(count, int)]
    return {"replicas": max(counts)} if counts and max(counts) > 0 else {}


def option(settings: _Pairs, key: str) -> Any:
    """The new value of ``key``; None: there is none."""
    named: dict[str, Any] = {}
    for name, text in settings:
        if name == key:
            put(named, name, text)
    return (named.get(SECTION) or {}).get(key)


def changes(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """One line for each added, removed or changed key."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(after, dict):
            found += changes(before if isinstance(before, dict) else {}, after, f"{path}{key}.")
        elif key not in new:
            found.append(f"{path}{key}: {before} is gone")
        elif before != after:
            found.append(f"{path}{key}: {after}" + (f" (was {before})" if key in old else ""))
    return found


def told_rights(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    told = []
    for key in _RIGHTS:
        if _section(new).get(key):
            told.append(f"{SECTION}.{key} is on: what comes with the weights can run any code")
        elif _section(old).get(key):
            told.append(f"{SECTION}.{key} was on, and is off; --set {key}=true gives it anew, if you trust the weights")
    return told


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get(SECTION) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} in model-config.yaml must hold keys and values; it is {section!r}")
    return section

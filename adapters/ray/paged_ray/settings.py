"""Settings of a Ray Serve application: one model, its replicas, and the routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any

from paged_core import ConfigError, EngineConfig
from paged_serving import RequestLimits

ROUTINGS = ("prefix", "load")
_OF_SCALE = ("replicas", "max_replicas", "target_requests", "scale_up_s", "scale_down_s")


@dataclass(frozen=True)
class Settings:
    """The settings of replicas and ingress.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: str  # a folder or file that every node has, a hub id, or smollm2
    names: tuple[str, ...] = ()  # what clients call it; none: as ``model``
    replicas: int = 1  # to begin with, and at least
    max_replicas: int | None = None  # None: their number stays
    target_requests: float = 16.0  # running and waiting requests per replica, above which replicas are added
    scale_up_s: float = 30.0  # how long there must be more, before replicas are added
    scale_down_s: float = 600.0  # how long there must be fewer, before replicas are removed
    routing: str = "prefix"  # where a prompt's leading blocks are; or "load": power of two choices
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    device: str | None = None
    dtype: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    limits: RequestLimits = field(default_factory=RequestLimits)
    max_queue: int = 1000  # sequences that wait in a replica
    drain_s: float = 600.0  # for running requests to finish when their replica is removed
    step_timeout_s: float = 300.0  # an engine whose step takes longer is stuck, and its replica is replaced
    api_keys: tuple[str, ...] = ()
    strict_fields: bool = False  # refuse fields of requests that nobody knows; else they are left out

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas is {self.replicas}; there must be at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas}); raise it")
        if self.routing not in ROUTINGS:
            raise ConfigError(f"routing is {self.routing!r}; use {' or '.join(ROUTINGS)}")
        if self.target_requests <= 0:
            raise ConfigError(f"target_requests is {self.target_requests}; it must be above 0")

    @property
    def served_names(self) -> tuple[str, ...]:
        return self.names or (str(self.model),)

    @property
    def key(self) -> bytes:
        """Of the digests that are told: applications of different models don't take each other's for their own. It need
        be no secret: who forges digests sends his requests to the wrong replica."""
        return blake2b("\0".join((str(self.model), *self.names)).encode(), digest_size=32).digest()

    @property
    def of_a_replica(self) -> Settings:
        """The settings of a replica, which don't depend on the number of replicas, so that scaling replaces none."""
        plain = Settings(self.model)
        return replace(self, **{name: getattr(plain, name) for name in _OF_SCALE})

    @property
    def max_ongoing(self) -> int:
        """Most requests that Ray sends to one replica. The replica's own Service refuses further ones with a better
        error."""
        return 2 * ((self.engine.max_num_seqs or 256) + self.max_queue)


def settings(model: str, **given: Any) -> Settings:
    """Settings from keyword arguments: fields of Settings, of an EngineConfig, and of RequestLimits.

    Raises:
        TypeError: there is no such field.
        ConfigError: a value is out of its range.
    """
    own, engine, limits = (_names(each) for each in (Settings, EngineConfig, RequestLimits))
    unknown = given.keys() - own - engine - limits
    if unknown:
        raise TypeError(f"there is no setting called {sorted(unknown)[0]!r}; there are {', '.join(sorted(own))}, "
                        "and the fields of EngineConfig and RequestLimits")  # fmt: skip
    kept = {name: _plain(value) for name, value in given.items() if name in own}
    of_engine = {name: value for name, value in given.items() if name in engine}
    of_limits = {name: value for name, value in given.items() if name in limits}
    if of_engine:
        kept["engine"] = EngineConfig(**of_engine)
    if of_limits:
        kept["limits"] = RequestLimits(**of_limits)
    return Settings(model, **kept)


def from_mapping(args: Mapping[str, Any]) -> Settings:
    """The same of a config file's ``args`` or of ``serve run``'s ``name=value``, which are all text.

    Raises:
        ConfigError: no model is named, a setting is unknown, or a value isn't what it must be.
    """
    given = dict(args)
    model = given.pop("model", None)
    if not model:
        raise ConfigError("args name no model; give model: a folder, a hub id, a GGUF file, or smollm2")
    try:
        return settings(str(model), **{name: _number(value) for name, value in given.items()})
    except TypeError as error:
        raise ConfigError(str(error)) from error


def _names(dataclass_: type) -> set[str]:
    return {each.name for each in fields(dataclass_)} - {"engine", "limits"}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _number(value: Any) -> Any:
    """``serve run`` passes text where a file has numbers."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)

"""The settings in an archive's model-config.yaml: TorchServe's own keys, and ours under ``paged``. Needs no TorchServe
at run time: the commands check what they write with it, and the handler reads its settings with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from paged_core import ConfigError, EngineConfig

SECTION = "paged"
MAX_REPLY_BYTES = 6_553_500  # TorchServe's max_response_size: a longer message kills the worker

_ENGINE_TYPES: Mapping[str, Any] = {each.name: each.type for each in fields(EngineConfig)}
_FRONTEND: Mapping[str, type] = {  # what TorchServe reads itself, as far as it has a meaning with this handler
    "responseTimeout": int,
    "startupTimeout": int,
    "jobQueueSize": int,
    "deviceType": str,
    "deviceIds": list,
    "parallelType": str,
    "parallelLevel": int,
    "maxRetryTimeoutInSec": int,
}

# Of plain requests that leave them out; each means what it means to TGI, and max_length what it means to generate().
DEFAULTS: Mapping[str, type] = {
    "do_sample": bool, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float,
    "frequency_penalty": float, "stop": list, "truncate": int, "max_length": int,
    "stream": bool,
}  # fmt: skip
SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p"})  # each of them turns sampling on
REPLIES = ("text", "json", "list")
_WITHOUT, _NO_LORA = "none", "there are none here yet"

_LEAST: Mapping[str, float] = {
    "replicas": 1,
    "max_new_tokens": 1,
    "max_grammar_ms": 1,
    "max_reply_bytes": 1,
    "heartbeat_s": 0.1,
}


@dataclass(frozen=True)
class SectionSettings:
    """Section ``paged``: which model, how it is loaded and run, and how plain requests are answered."""

    tokenizer: str | None = None  # if it isn't the model's own: a folder inside, another folder, or a hub id
    model: str | None = None  # a folder or a zip inside the archive, another folder, or a hub id; None: look for it
    device: str | None = None  # "cpu", "cuda", "cuda:1", "auto" (over all GPUs that the worker sees)
    replicas: int | None = None  # engines, each on a GPU of its own; None: one, if there is one GPU
    dtype: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    max_grammar_ms: int = 500  # of processor time, to compile what one request's answer must follow
    max_new_tokens: int = 100  # for plain requests that don't say
    defaults: dict[str, Any] = field(default_factory=dict)  # of DEFAULTS, for plain requests that don't say
    reply: str = "text"  # how one plain prompt is answered: text, {"text": ...} as json, or a list of one text
    return_full_text: bool = True  # whether answers to plain requests begin with the prompt, as stock handlers' do
    served_model_name: str | list[str] | None = None  # what else than the archive's name clients may call the model
    max_reply_bytes: int = MAX_REPLY_BYTES  # TorchServe's max_response_size
    adapters: str | None = None  # "none": the model is served without those that the old handler's section names
    heartbeat_s: float = 3.0  # requests are dropped when TorchServe hasn't asked for their news for so long
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def served_model_names(self) -> list[str]:
        named = self.served_model_name
        return [named] if isinstance(named, str) else list(named or ())


def read_settings(config: Mapping[str, Any] | None) -> SectionSettings:
    """The settings in a model-config.yaml that has been read.

    Raises:
        ConfigError: a key isn't known, its value can't be used, or the model would be another one without what the
            section of an old handler asks for.
    """
    section = (config or {}).get(SECTION) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} in model-config.yaml must hold keys and values; it is {section!r}")
    own: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for name, value in section.items():
        if name in _ENGINE_TYPES:
            engine[name] = _typed(name, value, str(_ENGINE_TYPES[name]))
        elif name in _OWN_TYPES:
            own[name] = _typed(name, value, _OWN_TYPES[name])
        else:
            raise ConfigError(f"{SECTION}.{name} is no setting; there are {', '.join(known_keys())}")
    settings = SectionSettings(**own, engine=EngineConfig(**engine))
    _check_plain(settings)
    _check_adapters(settings, (config or {}).get("handler"))
    for name, least in _LEAST.items():
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{SECTION}.{name} is {value}; it must be at least {least}")
    return settings


def _check_plain(settings: SectionSettings) -> None:
    """Raises ConfigError for settings with which plain requests can't be answered."""
    if settings.reply not in REPLIES:
        raise ConfigError(f"{SECTION}.reply is {settings.reply!r}; there are {', '.join(REPLIES)}")
    for name, value in settings.defaults.items():
        if name not in DEFAULTS:
            raise ConfigError(f"{SECTION}.defaults.{name} is no setting; there are {', '.join(DEFAULTS)}")
        _typed(f"{SECTION}.defaults.{name}", value, DEFAULTS[name].__name__)


def _check_adapters(settings: SectionSettings, handler: Any) -> None:
    """Raises ConfigError for adapters in ``handler``, the section that vLLM's handler reads."""
    if settings.adapters not in (None, _WITHOUT):
        raise ConfigError(
            f"{SECTION}.adapters is {settings.adapters!r}; {_WITHOUT!r} is all that it can be: {_NO_LORA}"
        )
    handler = handler if isinstance(handler, Mapping) else {}
    engine = handler.get("vllm_engine_config")
    asked = handler.get("adapters") or (isinstance(engine, Mapping) and engine.get("enable_lora"))
    if asked and settings.adapters is None:
        raise ConfigError(
            f"model-config.yaml asks for adapters (LoRA) beside the model, and {_NO_LORA}: merge one into the weights "
            f"(peft's merge_and_unload), or say --set adapters={_WITHOUT} to serve the model without them"
        )


def known_keys() -> list[str]:
    """Keys of the section ``paged``."""
    return sorted([*_OWN_TYPES, *_ENGINE_TYPES])


def put(config: dict[str, Any], key: str, text: str) -> None:
    """Set ``key`` in a model-config.yaml, wherever it belongs, to the value of ``text``, which is YAML.

    Raises:
        ConfigError: there is no such key, or the value isn't one for it.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text} can't be read: {error}") from error
    if key in ("max_num_requests", "batchSize"):
        config["batchSize"] = _typed(key, value, "int")
        if config["batchSize"] < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 1")
    elif key in _FRONTEND:
        config[key] = _typed(key, value, _FRONTEND[key].__name__)
    elif key in _OWN_TYPES or key in _ENGINE_TYPES:
        section = {**(config.get(SECTION) or {}), key: value}
        read_settings({SECTION: section})
        config[SECTION] = section
    else:
        known = ["max_num_requests", *_FRONTEND, *known_keys()]
        raise ConfigError(f"{key} is no setting; there are {', '.join(sorted(known))}")


_OWN_TYPES: Mapping[str, str] = {each.name: str(each.type) for each in fields(SectionSettings) if each.name != "engine"}


def _typed(name: str, value: Any, wanted: str) -> Any:
    """``value`` as a setting of type ``wanted`` (an annotation: "int | None")."""
    kinds = [kind.strip().partition("[")[0] for kind in wanted.split("|")]
    if value is None and "None" in kinds:
        return None
    if "float" in kinds and type(value) is int:
        return float(value)
    if type(value).__name__ in kinds:
        return value
    raise ConfigError(f"{name} is {value!r}; it must be {' or '.join(kinds)}")

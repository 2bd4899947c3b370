"""Frontend: the common part of LLM and AsyncEngine: an Engine with its text side, and how both are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from paged_core.config import EngineConfig, EngineSizes
from paged_core.engine.engine import Engine
from paged_core.text.codec import TextCodec

_OF_ENGINE = ("device", "dtype", "plugins", "progress")
_OF_CONFIG = tuple(field.name for field in fields(EngineConfig))


class Frontend:
    """An engine with its text side.

    Args:
        model: an Engine, or whatever an Engine takes.
        tokenizer: taken from the model (by the ``load_tokenizer`` hook) when None.
        config: an EngineConfig; or its fields are among ``options``.
        options: keyword arguments of Engine, and fields of EngineConfig instead of ``config``.

    Raises:
        TypeError: an option is unknown, or ``model`` is an Engine, whose options are set already.
        Else what Engine raises.
    """

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig | None, options: Mapping[str, Any]) -> None:
        _refuse_unknown(options)
        self.engine = (
            _taken_over(model, config, options) if isinstance(model, Engine) else _build(model, config, options)
        )
        self.codec = TextCodec(tokenizer if tokenizer is not None else self.engine.tokenizer)

    @property
    def tokenizer(self) -> Any:
        return self.codec.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The user's settings."""
        return self.engine.config

    @property
    def sizes(self) -> EngineSizes:
        """The sizes chosen from them."""
        return self.engine.sizes


def _taken_over(engine: Engine, config: EngineConfig | None, options: Mapping[str, Any]) -> Engine:
    if config is not None or options:
        given = ", ".join(options) or "config"
        raise TypeError(f"the engine is built already, and {given} can't change it; give it where you build it")
    return engine


def _build(model: Any, config: EngineConfig | None, options: Mapping[str, Any]) -> Engine:
    config_fields = {name: value for name, value in options.items() if name in _OF_CONFIG}
    if config is not None and config_fields:
        raise TypeError(f"give either config or its fields ({', '.join(config_fields)}), not both")
    engine_options = {name: value for name, value in options.items() if name in _OF_ENGINE}
    return Engine(model, config or EngineConfig(**config_fields), **engine_options)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    known = (*_OF_ENGINE, *_OF_CONFIG)
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise TypeError(f"there is no option called {name!r}; {hint}")

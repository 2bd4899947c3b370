"""Translates an old handler's settings of generation and loading into ours, and lists those without a meaning here.
Knows configurations, not archives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from paged_torchserve.families import Family
from paged_torchserve.settings import DEFAULTS, SAMPLING

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "float32": "float32", "float16": "float16",
           "bfloat16": "bfloat16"}  # fmt: skip
_VLLMS = ("max_num_seqs", "max_model_len", "gpu_memory_utilization", "block_size", "enable_prefix_caching", "seed",
          "max_num_batched_tokens", "tensor_parallel_size")  # fmt: skip
# The model's place, which is read when the model is searched.
_PLACES = ("model_path", "model_name", "base_model_path", "model")
_SECTIONS = ("handler", "handler.vllm_engine_config", "setup_config.json")


class Translated(NamedTuple):
    section: dict[str, Any]  # for ``paged`` in model-config.yaml
    ignored: list[str]  # KEY: VALUE


def translate(handler: Mapping[str, Any], setup: Mapping[str, Any], family: Family | None) -> Translated:
    """``handler``: that section of the old model-config.yaml; ``setup``: a setup_config.json's."""
    engine = handler.get("vllm_engine_config")
    engine = engine if isinstance(engine, Mapping) else {}
    section, used = _generation({**setup, **handler}, family)
    section |= _loading({**setup, **handler}, engine, used)
    old = {"handler": handler, "handler.vllm_engine_config": engine, "setup_config.json": setup}
    return Translated(section, list(_ignored(old, used)))


def _generation(old: Mapping[str, Any], family: Family | None) -> tuple[dict[str, Any], set[str]]:
    """(settings of plain requests, keys that they were taken from)"""
    section: dict[str, Any] = {}
    defaults = dict(family.defaults) if family is not None else {}
    defaults |= {"stream": True} if family is not None and family.streamed else {}
    used = {name for name in DEFAULTS if _fits(old.get(name), DEFAULTS[name]) and name != "max_length"}
    if old.get("do_sample") is False or str(old.get("temperature")) in ("0", "0.0"):  # greedy, whatever stands beside
        used -= SAMPLING
        defaults = {name: value for name, value in defaults.items() if name not in SAMPLING}
    defaults |= {name: _number(old[name], DEFAULTS[name]) for name in used}
    if family is not None and family.reply != "text":
        section["reply"] = family.reply
    full = old.get("return_full_text", family.full_text if family is not None else True)
    if isinstance(full, bool):
        used.add("return_full_text")
        section |= {} if full else {"return_full_text": False}
    length, meaning = _length(old, family)
    if length is not None:
        used.add(length)
        defaults.pop("max_length", None)
        place = section if meaning == "max_new_tokens" else defaults
        place[meaning] = int(old[length])
    return ({**section, "defaults": defaults} if defaults else section), used


def _length(old: Mapping[str, Any], family: Family | None) -> tuple[str | None, str]:
    """(the key that limits an answer, if there is one; what it means)"""
    if family is not None and _fits(old.get(family.length), int):
        return family.length, family.meaning
    if family is None:  # as in Hugging Face's generate: the first of them counts
        for name in ("max_new_tokens", "max_length"):
            if _fits(old.get(name), int):
                return name, name
    return None, ""


def _loading(old: Mapping[str, Any], engine: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, found in (("dtype", engine), ("dtype", old), ("torch_dtype", old)):
        dtype = _DTYPES.get(str(found.get(name)).removeprefix("torch."))
        if dtype is not None:
            section.setdefault("dtype", dtype)
            used.add(name)
    for name in (*_VLLMS, "served_model_name"):
        if engine.get(name) is not None:
            section[name] = engine[name]
            used.add(name)
    return section


def _ignored(old: Mapping[str, Mapping[str, Any]], used: set[str]) -> Iterator[str]:
    for place, values in old.items():
        for name, value in values.items():
            if name not in used and name not in _PLACES and f"{place}.{name}" not in _SECTIONS:
                yield f"{place}.{name}: {value}"


def _fits(value: Any, kind: type) -> bool:
    """setup_config.json has its numbers as strings."""
    if isinstance(value, bool) or kind in (bool, list):
        return isinstance(value, kind)
    try:
        return kind(value) is not None and value is not None
    except (TypeError, ValueError):
        return False


def _number(value: Any, kind: type) -> Any:
    return value if kind in (bool, list) else kind(value)

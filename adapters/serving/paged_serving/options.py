"""The engine's options: on a command line, in a file's section, in the docs. One list, EngineConfig's own.

``python -m paged_serving.options PAGE ...`` writes the table anew into pages that have the two marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from paged_core import EngineConfig

_DEST = "engine_"  # a command may have a --seed of its own
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
BEGIN, END = "<!-- engine options: python -m paged_serving.options -->", "<!-- end of engine options -->"


def add_load_options(group: Any, *, device: bool = True) -> None:
    """Add to ``group`` the options that say how the engine loads its model: ``--dtype``, and ``--device`` if wanted."""
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto (default: auto, as the model is stored)")
    if device:
        group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def add_engine_options(
    group: Any, *, leave_out: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """Add every engine option with a flag to ``group``, an argparse parser or group.

    Args:
        leave_out: names of EngineConfig's fields that this command has no use for.
        defaults: this command's defaults of some fields, instead of EngineConfig's own.
    """
    for field in fields(EngineConfig):
        option = field.metadata["option"]
        if option.flag is None or field.name in leave_out:
            continue
        default = (defaults or {}).get(field.name)
        told = option.default if default is None else default
        if "bool" in str(field.type):
            kind: dict[str, Any] = {"action": "store_const", "const": False}
            what = f"don't {option.what}"
        else:
            kind = {"type": _kind(field), "metavar": option.metavar}
            what = f"{option.what} (default: {told})"
        group.add_argument(option.flag, dest=_DEST + field.name, default=default, help=what, **kind)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The options of ``add_engine_options`` as an EngineConfig; absent ones keep their defaults.

    Raises:
        ConfigError: a value is out of its range.
    """
    said = {name.removeprefix(_DEST): value for name, value in vars(args).items() if name.startswith(_DEST)}
    return EngineConfig(**{name: value for name, value in said.items() if value is not None})


def whole_number(text: str, low: int = 1) -> int:
    """For ``add_argument(type=...)``."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number from {low} on")
    return int(text)


def num_bytes(text: str) -> int:
    """For ``add_argument(type=...)``: bytes, or 64K, 300M, 20G, 1T of them, by 1024."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of bytes, such as 1000, 300M or 20G")
    return int(digits) << _UNITS.get(unit, 0)


def options_table() -> str:
    """Every field of EngineConfig as rows of a Markdown table."""
    rows = ["| setting | option | what | default |", "|---|---|---|---|"]
    for field in fields(EngineConfig):
        option = field.metadata["option"]
        flag = f"`{option.flag}`" if option.flag else ""
        rows.append(f"| `{field.name}` | {flag} | {option.what} | {option.default} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """A page's text, with today's table between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{options_table()}\n\n{END}{after}"


def _kind(field: Field[Any]) -> Any:
    kind = str(field.type).removesuffix(" | None")
    if kind == "int":
        return int if field.name == "seed" else num_bytes if field.name.endswith("_bytes") else whole_number
    return {"float": float, "str": str}[kind]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")

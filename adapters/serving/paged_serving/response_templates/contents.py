"""The content of a message's field as a value: the parsers that response templates name, and their ``transform``.

Each raises ValueError for a text that isn't what it reads.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import regex

_PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_BARE_KEY = re.compile(r'("(?:\\.|[^"\\])*")|(?<=[{,])(\s*)(\w+)(\s*):')
_PYTHON_NAMES = {"true": True, "false": False, "null": None}
_LARGEST = sys.float_info.max
_BETWEEN_VALUES = " \t\r\n;,"


def read(content: str, text: str, args: Mapping[str, Any]) -> Any:
    """``text`` as ``content`` (one of CONTENTS) reads it.

    Raises:
        ValueError: it isn't such a text.
    """
    try:
        return CONTENTS[content](text, args)
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply") from error


def transformed(transform: Any, scope: Mapping[str, Any]) -> Any:
    """``transform`` with its placeholders, strings such as "{content.name}", filled in from ``scope``.

    Raises:
        ValueError: ``scope`` lacks one.
    """
    if isinstance(transform, Mapping):
        return {key: transformed(each, scope) for key, each in transform.items()}
    if isinstance(transform, list):
        return [transformed(each, scope) for each in transform]
    found = _PLACEHOLDER.fullmatch(transform) if isinstance(transform, str) else None
    if found is None:
        return transform
    value: Any = scope
    for key in found[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"there is no {found[1]}")
        value = value[key]
    return value


def _text(text: str, args: Mapping[str, Any]) -> str:
    return text.strip() if args.get("strip", True) else text


def _bool(text: str, args: Mapping[str, Any]) -> bool:
    return text.strip().lower() in ("true", "1")


def _json(text: str, args: Mapping[str, Any]) -> Any:
    """JSON, with keys that aren't quoted and strings in other quotes where ``args`` say so; with ``several``, all the
    values that stand one after another, as a list."""
    kept: list[str] = []
    for begin, end in args.get("string_delims", ()):

        def keep(found: re.Match[str]) -> str:
            kept.append(found[1])
            return f'"\\u0000{len(kept) - 1}"'

        text = re.sub(re.escape(begin) + "(.*?)" + re.escape(end), keep, text, flags=re.DOTALL)
    if args.get("unquoted_keys"):
        text = _BARE_KEY.sub(lambda found: found[1] or f'{found[2]}"{found[3]}"{found[4]}:', text)
    try:
        value = _values(text) if args.get("several") else _STRICT.decode(text)
    except ValueError:
        if args.get("allow_non_json"):
            return text.strip()
        raise
    return _with(value, kept) if kept else value


def _values(text: str) -> list[Any]:
    found, place = [], 0
    text = text.strip(_BETWEEN_VALUES)
    while place < len(text):
        value, place = _STRICT.raw_decode(text, place)
        found.append(value)
        while place < len(text) and text[place] in _BETWEEN_VALUES:
            place += 1
    return found


def _with(value: Any, kept: list[str]) -> Any:
    if isinstance(value, str):
        return kept[int(value[1:])] if value.startswith("\0") else value
    if isinstance(value, list):
        return [_with(each, kept) for each in value]
    if isinstance(value, dict):
        return {_with(key, kept): _with(each, kept) for key, each in value.items()}
    return value


def number(text: str | float) -> float:
    """A float; what is too large for one is the largest: no JSON holds an infinity."""
    return max(-_LARGEST, min(_LARGEST, float(text)))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_STRICT = json.JSONDecoder(parse_float=number, parse_constant=_no_constant)


def _xml_inline(text: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Every match of ``tag_pattern``, which has groups "key" and "value"."""
    found: dict[str, Any] = {}
    for match in regex.finditer(args["tag_pattern"], text, flags=regex.DOTALL):
        key, value = match["key"], _inner(match["value"], args)
        if key in found and args.get("merge_duplicates"):
            value = [*(found[key] if isinstance(found[key], list) else [found[key]]), value]
        found[key] = value
    return found


def _kv_lines(text: str, args: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for line in text.split(args.get("line_sep", "\n")):
        key, separator, value = line.partition(args.get("kv_sep", ":"))
        if separator:
            found[_text(key, args)] = _inner(_text(value, args), args)
    return found


def _inner(value: str, args: Mapping[str, Any]) -> Any:
    parser = args.get("value_parser")
    return value if parser is None else read(parser.get("name", "text"), value, parser.get("args", {}))


def _python_calls(text: str, args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls with keyword arguments as Python writes them: in a list, or each in a line of its own."""
    try:
        lines = ast.parse(text.strip()).body
    except SyntaxError as error:
        raise ValueError(str(error)) from error
    return [_python_call(call) for line in lines for call in _elements(line)]


def _elements(line: ast.stmt) -> list[ast.expr]:
    if not isinstance(line, ast.Expr):
        raise ValueError("it is no list of calls")
    return line.value.elts if isinstance(line.value, ast.List) else [line.value]


def _python_call(call: ast.expr) -> dict[str, Any]:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        raise ValueError("it is no call")
    if call.args or any(each.arg is None for each in call.keywords):
        raise ValueError("a call may have keyword arguments only")
    arguments = {str(each.arg): _python_value(each.value) for each in call.keywords}
    return {"name": ast.unparse(call.func), "arguments": arguments}


def _python_value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value) if value is None or isinstance(value, str | bool | int | float):
            return number(value) if isinstance(value, float) else value
        case ast.Name(name) if name in _PYTHON_NAMES:
            return _PYTHON_NAMES[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) in (int, float):
            return -number(value) if isinstance(value, float) else -value  # type: ignore[operator]
        case ast.List(values):
            return [_python_value(each) for each in values]
        case ast.Dict(keys, values) if all(
            isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys
        ):
            return {key.value: _python_value(each) for key, each in zip(keys, values, strict=True)}  # type: ignore
    raise ValueError(f"{ast.unparse(node)} is no value of JSON")


CONTENTS: Mapping[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "text": _text,
    "int": lambda text, args: int(text),
    "float": lambda text, args: float(text),
    "bool": _bool,
    "json": _json,
    "xml-inline": _xml_inline,
    "kv-lines": _kv_lines,
    "python-call-list": _python_calls,
}
ENDS_ITSELF = frozenset({"json", "python-call-list"})  # a text that can be read is whole, though nothing closed it

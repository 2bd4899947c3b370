"""vLLM's spellings of options: taken where they mean what ours do, or what is done anyway; else refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paged_core import ConfigError
from paged_openai.vllm_options import (
    ALIASES,
    DONE_ANYWAY,
    HINTS,
    ONLY,
    REASONING_PARSERS,
    REFUSED,
    SHORT,
    TOOL_PARSERS,
)

if TYPE_CHECKING:
    from paged_serving import ResponseTemplate

_THAT_REASON = {name for names in REASONING_PARSERS.values() for name in names}


def add_spellings(parser: argparse.ArgumentParser) -> None:
    """Add vLLM's options to ``parser``, which must have ours already. Help shows those that do something."""
    group = parser.add_argument_group(
        "vLLM's spellings",
        "All other options of `vllm serve` are accepted too if no answer depends on them, or refused with what to do.",
    )
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    for flag, ours in ALIASES.items():
        group.add_argument(*_flags(flag), action=_As, ours=known[ours], help=f"our {ours}")
    group.add_argument(
        "--allowed-origins", type=_origins, dest="cors_origin", metavar="JSON", default=argparse.SUPPRESS,
        help="our --cors-origin, for each of a list",
    )  # fmt: skip
    group.add_argument(
        "--tool-call-parser", type=_tool_parser, dest="response_template", metavar="NAME", default=argparse.SUPPRESS,
        help="our --response-template, by vLLM's name of the parser",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-parser", choices=REASONING_PARSERS, metavar="NAME",
        help="checked only: the model's response template must read reasoning of this form",
    )  # fmt: skip
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for flag in DONE_ANYWAY:
        group.add_argument(flag, action="store_true", dest="_done_anyway", **hidden)
    for flag in HINTS:
        group.add_argument(*_flags(flag), nargs="?", dest="_done_anyway", **hidden)
    for flag, (values, why) in ONLY.items():
        group.add_argument(*_flags(flag), action=_Only, values=values, why=why, dest="_only", **hidden)
    for flag, why in REFUSED.items():
        group.add_argument(*_flags(flag), action=_Only, values=(), why=why, nargs="?", dest="_only", **hidden)
    _with_underscores(parser)


def _with_underscores(parser: argparse.ArgumentParser) -> None:
    """``--max_model_len`` is ``--max-model-len``, as vLLM has it. Help tells of the one."""
    known = parser._option_string_actions
    for flag, action in list(known.items()):
        if flag.startswith("--"):
            known.setdefault("--" + flag[2:].replace("-", "_"), action)


def _flags(flag: str) -> list[str]:
    return [flag, *SHORT.get(flag, ())]


def check_reasoning(name: str | None, template: ResponseTemplate | None) -> None:
    """Raises ConfigError if ``template`` doesn't read what vLLM's parser ``name`` does. A template that isn't of ours
    is trusted if it reads any reasoning."""
    if name is None:
        return
    fitting = REASONING_PARSERS[name]
    other = template is not None and template.name in _THAT_REASON and template.name not in fitting
    if template is None or template.reasoning is None or other:
        found = "none is known of it" if template is None else f"its response template is {template.name}"
        ways = f"leave it out, or give --response-template (such as {', '.join(fitting)})"
        raise ConfigError(f"--reasoning-parser {name} isn't how this model's reasoning is read: {found}; {ways}")


class _As(argparse.Action):
    """Another flag of ``ours``."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, ours: argparse.Action, help: str) -> None:
        assert not isinstance(ours.type, str), "argparse knows kinds by name too; none of ours is"
        super().__init__(
            option_strings, ours.dest, ours.nargs, type=ours.type, choices=ours.choices, metavar=ours.metavar,
            default=argparse.SUPPRESS, help=help,
        )  # fmt: skip
        self._ours = ours

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        self._ours(parser, namespace, values, option_string)


class _Only(argparse.Action):
    def __init__(self, *args: Any, values: Sequence[str], why: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._values, self._why = values, why

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values not in self._values:
            given = "" if values is None or values == [] else f" {values}"
            parser.error(f"{option_string}{given} can't be had here: {self._why}")


def _tool_parser(name: str) -> str:
    if name not in TOOL_PARSERS:
        told = f"there are {', '.join(TOOL_PARSERS)}; leave it out, and the model's chat template tells, or use"
        raise argparse.ArgumentTypeError(f"{name!r} isn't known here: {told} --response-template")
    return TOOL_PARSERS[name]


def _origins(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a JSON list of origins")
    return found

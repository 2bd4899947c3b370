"""vLLM's spellings of options: taken where they mean what ours do, or what is done anyway; else refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paged_core import ConfigError

if TYPE_CHECKING:
    from paged_serving import ResponseTemplate

_ALIASES = {  # vLLM's -> ours
    "--kv-cache-memory-bytes": "--kv-bytes",
    "--no-enable-prefix-caching": "--no-prefix-caching",
    "--enforce-eager": "--no-cuda-graphs",
    "--uvicorn-log-level": "--log-level",
    "--enable-log-requests": "--log-prompts",
}
_DONE_ANYWAY = (  # flags that ask for what is always so
    "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-prefix-caching", "--disable-log-requests",
    "--no-enable-log-requests", "--disable-log-stats", "--disable-uvicorn-access-log", "--enable-prompt-tokens-details",
    "--disable-frontend-multiprocessing", "--no-trust-remote-code",
    "--trust-remote-code",  # a permission that is not made use of: no code that a model brings is run
)  # fmt: skip
_ONLY: dict[str, tuple[tuple[str, ...], str]] = {  # values that ask for what is always so; what else there is
    "--pipeline-parallel-size": (("1",), "there is no pipeline parallelism"),
    "--data-parallel-size": (("1",), "run a server for each replica, and a balancer before them"),
    "--tokenizer-mode": (("auto",), "the model's own tokenizer is used"),
    "--load-format": (("auto", "safetensors", "hf"), "weights are read as transformers reads them"),
    "--quantization": (("none",), "models come as they were quantised; --dtype and --kv-cache-dtype say the rest"),
    "--cpu-offload-gb": (("0",), "weights stay where the model runs"),
    "--swap-space": (("0", "4"), "K/V go to --kv-host-bytes or --kv-disk"),
    "--response-role": (("assistant",), "answers are the assistant's"),
    "--runner": (("auto", "generate"), "models that embed or score texts aren't served"),
    "--task": (("auto", "generate"), "models that embed or score texts aren't served"),
    "--guided-decoding-backend": (("auto", "guidance", "llguidance"), "structures are llguidance's"),
}
_REFUSED = {
    "--revision": "download it first (hf download MODEL --revision ...), and give its folder as MODEL",
    "--tokenizer-revision": "download it first, and give its folder as --tokenizer",
    "--code-revision": "no code that a model brings is run",
    "--speculative-config": "there is no speculation yet",
    "--enable-lora": "merge the adapter into the model first (peft: merge_and_unload), and serve that",
    "--lora-modules": "merge the adapter into the model first (peft: merge_and_unload), and serve that",
    "--hf-overrides": "change config.json in the model's folder",
    "--override-generation-config": "change generation_config.json in the model's folder",
}
TOOL_PARSERS = {  # vLLM's -> our response templates
    "hermes": "hermes", "qwen3_coder": "qwen3-xml", "qwen3_xml": "qwen3-xml", "llama3_json": "llama3-json",
    "llama4_pythonic": "llama4-pythonic", "deepseek_v3": "deepseek", "deepseek_v31": "deepseek-v31",
    "openai": "gpt-oss", "granite": "granite3", "granite4": "granite4", "phi4_mini_json": "phi4-mini", "olmo3": "olmo3",
    "glm45": "glm4", "kimi_k2": "kimi-k2", "gemma4": "gemma4",
}  # fmt: skip
_THINK = (
    "hermes", "qwen3-xml", "deepseek", "deepseek-v31", "glm4", "granite3", "granite4", "kimi-k2", "lfm2", "olmo3",
    "phi4",
)  # fmt: skip
REASONING_PARSERS = {  # vLLM's -> our response templates that read reasoning of the same form
    "deepseek_r1": _THINK, "deepseek_v3": _THINK, "qwen3": _THINK, "glm45": _THINK, "olmo3": _THINK, "kimi_k2": _THINK,
    "mistral": ("mistral-args",), "openai_gptoss": ("gpt-oss",), "gemma4": ("gemma4",),
}  # fmt: skip
_THAT_REASON = {name for names in REASONING_PARSERS.values() for name in names}


def add_spellings(parser: argparse.ArgumentParser) -> None:
    """To be called when ``parser`` knows our own."""
    group = parser.add_argument_group("vLLM's spellings", "taken where they mean what ours do, else told what to do")
    known = {flag: action for action in parser._actions for flag in action.option_strings}
    for flag, ours in _ALIASES.items():
        group.add_argument(flag, action=_As, ours=known[ours], help=f"our {ours}")
    group.add_argument(
        "--allowed-origins", type=_origins, dest="cors_origin", metavar="JSON", default=argparse.SUPPRESS,
        help="our --cors-origin, for each",
    )  # fmt: skip
    group.add_argument(
        "--tool-call-parser", type=_tool_parser, dest="response_template", metavar="NAME", default=argparse.SUPPRESS,
        help="our --response-template, for models that it is known of",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-parser", choices=REASONING_PARSERS, metavar="NAME",
        help="refused where the model's response template reads reasoning of another form, or none",
    )  # fmt: skip
    for flag in _DONE_ANYWAY:
        group.add_argument(flag, action="store_true", dest="_done_anyway", default=argparse.SUPPRESS, help="it is so")
    for flag, (values, why) in _ONLY.items():
        told = f"{' or '.join(values)}: {why}"
        group.add_argument(flag, action=_Only, values=values, why=why, metavar="X", dest="_only",
                           default=argparse.SUPPRESS, help=told)  # fmt: skip
    for flag, why in _REFUSED.items():
        group.add_argument(flag, action=_Only, values=(), why=why, metavar="X", nargs="?", dest="_only",
                           default=argparse.SUPPRESS, help=f"refused: {why}")  # fmt: skip


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

"""``paged serve``: its options, and the server they make. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paged_core import Commands, ConfigError, InvalidRequestError, PagedCoreError
from paged_openai.prefixes import checked_prefix
from paged_openai.spellings import add_spellings
from paged_serving import RequestLimits, add_engine_options, engine_config, whole_number

_LIMITS = ("max_prompt_tokens", "max_tokens", "max_n", "max_prompts", "max_stop", "max_logprobs", "max_values",
           "max_grammar_ms")  # fmt: skip


def register(commands: Commands) -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser("serve", help="serve a model over HTTP, to OpenAI's and TGI's clients")
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")
    add_options(parser)
    parser.set_defaults(run=serve)


def main(argv: Sequence[str] | None = None) -> int:
    """The same as a program of its own. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="paged_openai", description="Serve a model to OpenAI's and TGI's clients.")
    parser.add_argument("--model", required=True, metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")
    add_options(parser)
    try:
        return serve(parser.parse_args(argv))
    except (PagedCoreError, InvalidRequestError) as error:
        print(f"paged_openai: {error}", file=sys.stderr)
        return 2


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="default: %(default)s, this machine only; 0.0.0.0: everybody")
    add("--port", type=_port, default=8000, metavar="N", help="default: %(default)s; 0: any free one")
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call it (default: MODEL)")
    _add_engine(parser.add_argument_group("engine"))
    _add_limits(parser.add_argument_group("limits"))
    _add_access(parser.add_argument_group("access"))
    _add_behaviour(parser.add_argument_group("behaviour"))
    add_spellings(parser)


def _add_engine(group: Any) -> None:
    add = group.add_argument
    add("--dtype", help="float32, bfloat16, float16 or auto (default: as the model is stored)")
    add("--device", help="default: a GPU if there is one")
    add("--tokenizer", metavar="X", help="another model's: a folder or a hub id (default: the model's own)")
    add("--chat-template", metavar="X", help="a file with one, or its text (default: the tokenizer's own)")
    add_engine_options(group, defaults={"gpu_memory_utilization": 0.9})
    add("--kv-events", metavar="ADDRESS",
        help="tell routers what the prefix cache holds, as vLLM does: tcp://*:5557 (default: nowhere)")  # fmt: skip
    add("--kv-events-replay", metavar="ADDRESS", help="repeat there what they missed: tcp://*:5558 (default: nowhere)")
    add("--kv-events-format", choices=("array", "map"), default="array", help="default: %(default)s")


def _add_limits(group: Any) -> None:
    add, limits = group.add_argument, RequestLimits()
    add(
        "--max-queue",
        type=_from_0,
        default=1000,
        metavar="N",
        help="sequences that wait (default: %(default)s)",
    )
    add("--max-prompt-tokens", type=whole_number, metavar="N", help="of one prompt (default: what the model takes)")
    add("--max-tokens", type=whole_number, metavar="N", help="of one answer (default: what the model gives)")
    for name, of_what in (("max_n", "sequences of one prompt"), ("max_prompts", "of one request"),
                          ("max_stop", "stop strings of one request"), ("max_logprobs", "of one token"),
                          ("max_values", "log-probabilities, or token ids, of one request"),
                          ("max_grammar_ms", "of processor time, to compile the grammar of one request"),
                          ):  # fmt: skip
        told, default = f"{of_what} (default: %(default)s)", getattr(limits, name)
        add(f"--{name.replace('_', '-')}", type=whole_number, metavar="N", default=default, help=told)
    add("--max-stored-responses", type=_from_0, default=1000, metavar="N",
        help="of /v1/responses, that later ones may go on from (default: %(default)s)")  # fmt: skip
    add(
        "--max-body-bytes",
        type=whole_number,
        metavar="N",
        default=2 << 20,
        help="of one request (default: %(default)s)",
    )
    add("--max-connections", type=whole_number, metavar="N", default=4096, help="open at once (default: %(default)s)")
    add("--body-timeout", type=_seconds, default=30.0, metavar="S", help="for a body to come (default: %(default)s)")
    add("--request-timeout", type=_seconds, metavar="S", help="for a whole request (default: none)")
    add("--step-timeout", type=_seconds, default=300.0, metavar="S",
        help="for a step of the engine, after which /health says that it is stuck (default: %(default)s)")  # fmt: skip
    add("--timeout-keep-alive", type=whole_number, default=75, metavar="S",
        help="for which an idle connection stays open (default: %(default)s)")  # fmt: skip
    add("--shutdown-timeout", type=_seconds, default=30.0, metavar="S",
        help="for running requests to end after SIGTERM (default: %(default)s)")  # fmt: skip


def _add_access(group: Any) -> None:
    add = group.add_argument
    add("--api-key", action="append", default=[], metavar="KEY", help="let in who gives it; may be repeated")
    add("--api-key-file", type=Path, metavar="FILE", help="keys that other users can't see in the process list")
    add("--cors-origin", action="append", default=[], metavar="URL", help="let pages of this origin call; repeatable")
    add("--root-path", type=checked_prefix, default="", metavar="PATH",
        help="that a proxy serves us under, as /llm (default: what X-Forwarded-Prefix says)")  # fmt: skip
    add("--ssl-certfile", type=Path, metavar="FILE", help="speak TLS, with this certificate")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="its key, if it isn't in the same file")
    add("--ssl-ca-certs", type=Path, metavar="FILE", help="ask clients for a certificate signed by these")


def _add_behaviour(group: Any) -> None:
    add = group.add_argument
    add("--tgi-chat-stream", action="store_true",
        help="stream chats as the text-generation client reads them (OpenAI's don't)")  # fmt: skip
    add("--strict-fields", action="store_true",
        help="refuse requests with fields that nobody knows (else the header x-ignored-fields names them)")  # fmt: skip
    add("--response-template", metavar="FILE",
        help="how the model writes reasoning and calls of tools: a file, the name of one known here (docs/serving.md), "
        "or none (default: as the tokenizer or its chat template says)")  # fmt: skip
    add("--reasoning", default="auto", choices=("auto", "off"),
        help="tell reasoning apart from what is said, where the model marks it (default: %(default)s)")  # fmt: skip
    add("--no-page", action="store_false", dest="page", help="no page for browsers at /")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="default: %(default)s")
    add("--log-prompts", action="store_true", help="write requests' bodies to the log")
    add("--generation-config", default="auto", choices=("auto", "vllm"),
        help="what requests leave unsaid: as the model's generation_config.json says, or neutral")  # fmt: skip


def serve(args: argparse.Namespace) -> int:
    """Load the model, then serve until a signal comes."""
    try:
        from paged_openai import serving
    except ImportError as error:
        raise ConfigError(f"{error}; a server needs more: pip install 'paged-core[server]'") from error
    return serving.serve(args, engine_config(args), request_limits(args))


def request_limits(args: argparse.Namespace) -> RequestLimits:
    return RequestLimits(**{name: getattr(args, name) for name in _LIMITS})


def _from_0(text: str) -> int:
    return whole_number(text, 0)


def _port(text: str) -> int:
    if _from_0(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is above 65535, the last port")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of seconds")
    return value

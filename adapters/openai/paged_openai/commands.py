"""``paged serve``: its options, and the server they make. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paged_core import Commands, ConfigError, InvalidRequestError, PagedCoreError, settle_threads
from paged_openai.prefixes import checked_prefix
from paged_openai.spellings import add_spellings
from paged_serving import RequestLimits, add_engine_options, add_load_options, engine_config, whole_number

_LIMITS = ("max_prompt_tokens", "max_tokens", "max_n", "max_prompts", "max_stop", "max_logprobs", "max_values",
           "max_grammar_ms")  # fmt: skip


def register(commands: Commands) -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP: OpenAI's, Anthropic's and TGI's protocols",
        description="Serve a model over HTTP, with OpenAI's, Anthropic's and TGI's protocols, until a signal comes.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")
    add_options(parser)
    parser.set_defaults(run=serve)


def main(argv: Sequence[str] | None = None) -> int:
    """The same as a program of its own. Returns its exit status."""
    settle_threads()
    parser = argparse.ArgumentParser(
        prog="paged_openai", description="Serve a model over HTTP, with OpenAI's, Anthropic's and TGI's protocols."
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")
    add_options(parser)
    try:
        return serve(parser.parse_args(argv))
    except (PagedCoreError, InvalidRequestError) as error:
        print(f"paged_openai: {error}", file=sys.stderr)
        return 2


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only; 0.0.0.0: all)",
    )
    add(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="port to listen on (default: %(default)s; 0: any free port)",
    )
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that clients may use for the model (default: MODEL)",
    )
    _add_engine(parser.add_argument_group("engine"))
    limits = parser.add_argument_group("limits")
    _add_limits(limits)
    _add_times(limits)
    _add_access(parser.add_argument_group("access"))
    _add_behaviour(parser.add_argument_group("behaviour"))
    add_spellings(parser)


def _add_engine(group: Any) -> None:
    add = group.add_argument
    add_load_options(group)
    add("--tokenizer", metavar="X", help="folder or hub id of another tokenizer (default: the model's own)")
    add("--chat-template", metavar="X", help="chat template: a file or its text (default: the tokenizer's own)")
    add("--default-chat-template-kwargs", type=_object, default={}, metavar="JSON",
        help="variables of the chat template, for requests whose chat_template_kwargs lack them")  # fmt: skip
    add_engine_options(group, defaults={"gpu_memory_utilization": 0.9})
    add("--kv-events", metavar="ADDRESS",
        help="publish the prefix cache's contents here, in vLLM's format: tcp://*:5557 (default: off)")  # fmt: skip
    add(
        "--kv-events-replay",
        metavar="ADDRESS",
        help="repeat missed events at this address: tcp://*:5558 (default: off)",
    )
    add("--kv-events-format", choices=("array", "map"), default="array",
        help="form of an event (default: %(default)s)")  # fmt: skip


def _add_limits(group: Any) -> None:
    add, limits = group.add_argument, RequestLimits()
    add(
        "--max-queue",
        type=_from_0,
        default=1000,
        metavar="N",
        help="most sequences that wait; further requests get 503 (default: %(default)s)",
    )
    add(
        "--max-prompt-tokens",
        type=whole_number,
        metavar="N",
        help="most tokens of one prompt (default: the model's limit)",
    )
    add("--max-tokens", type=whole_number, metavar="N", help="most tokens of one answer (default: the model's limit)")
    for name, of_what in (("max_n", "most sequences of one prompt"), ("max_prompts", "most prompts of one request"),
                          ("max_stop", "most stop strings of one request"),
                          ("max_logprobs", "most log-probabilities of one token"),
                          ("max_values", "most log-probabilities, or token ids, of one request"),
                          ("max_grammar_ms", "processor time to compile the grammar of one request, in ms"),
                          ):  # fmt: skip
        told, default = f"{of_what} (default: %(default)s)", getattr(limits, name)
        add(f"--{name.replace('_', '-')}", type=whole_number, metavar="N", default=default, help=told)
    add("--max-stored-responses", type=_from_0, default=1000, metavar="N",
        help="stored answers of /v1/responses, which later ones can continue (default: %(default)s)")  # fmt: skip
    add(
        "--max-body-bytes",
        type=whole_number,
        metavar="N",
        default=2 << 20,
        help="most bytes of one request's body (default: %(default)s)",
    )
    add(
        "--max-connections",
        type=whole_number,
        metavar="N",
        default=4096,
        help="most open connections (default: %(default)s)",
    )


def _add_times(group: Any) -> None:
    add = group.add_argument
    add(
        "--body-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="time to receive a body, in s (default: %(default)s)",
    )
    add("--request-timeout", type=_seconds, metavar="S", help="time for a whole request, in s (default: no limit)")
    add("--step-timeout", type=_seconds, default=300.0, metavar="S",
        help="time for an engine step, in s; beyond it /health says stuck (default: %(default)s)")  # fmt: skip
    add("--timeout-keep-alive", type=whole_number, default=75, metavar="S",
        help="time that an idle connection stays open, in s (default: %(default)s)")  # fmt: skip
    add("--shutdown-timeout", type=_seconds, default=30.0, metavar="S",
        help="time for running requests to finish after SIGTERM, in s (default: %(default)s)")  # fmt: skip


def _add_access(group: Any) -> None:
    add = group.add_argument
    add("--api-key", action="append", default=[], metavar="KEY", help="require this key from clients; repeatable")
    add(
        "--api-key-file", type=Path, metavar="FILE", help="file of keys, one per line; hides them from the process list"
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="allow web pages of this origin to call; repeatable",
    )
    add("--root-path", type=checked_prefix, default="", metavar="PATH",
        help="path under which a proxy serves us, such as /llm (default: from X-Forwarded-Prefix)")  # fmt: skip
    add("--ssl-certfile", type=Path, metavar="FILE", help="serve TLS with this certificate")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="the certificate's key, if it is in another file")
    add("--ssl-ca-certs", type=Path, metavar="FILE", help="require a client certificate signed by one of these")


def _add_behaviour(group: Any) -> None:
    add = group.add_argument
    add("--tgi-chat-stream", action="store_true",
        help="stream chats in the form of the text-generation client, which OpenAI's clients misread")  # fmt: skip
    add("--strict-fields", action="store_true",
        help="refuse unknown fields of requests (default: ignore them; x-ignored-fields names them)")  # fmt: skip
    add("--response-template", metavar="FILE",
        help="how the model writes reasoning and tool calls: a file, a name from docs/serving.md, or none "
        "(default: found by the tokenizer or its chat template)")  # fmt: skip
    add("--reasoning", default="auto", choices=("auto", "off"),
        help="separate reasoning from the answer's text, if the model marks it (default: %(default)s)")  # fmt: skip
    add("--no-page", action="store_false", dest="page", help="serve no page for browsers at /")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"),
        help="least level that is logged (default: %(default)s)")  # fmt: skip
    add("--log-prompts", action="store_true", help="log the bodies of requests")
    add("--generation-config", default="auto", choices=("auto", "vllm"),
        help="sampling defaults: the model's generation_config.json, or neutral (default: %(default)s)")  # fmt: skip


def serve(args: argparse.Namespace) -> int:
    """Load the model, then serve until a signal comes."""
    try:
        from paged_openai import serving
    except ImportError as error:
        raise ConfigError(f"{error}; a server needs more: pip install 'paged-core[server]'") from error
    return serving.serve(args, engine_config(args), request_limits(args))


def request_limits(args: argparse.Namespace) -> RequestLimits:
    return RequestLimits(**{name: getattr(args, name) for name in _LIMITS})


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} isn\'t a JSON object, such as {{"enable_thinking": false}}')
    return value


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

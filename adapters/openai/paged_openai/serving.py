"""From options to a running server: builds the engine, the service and the application, and waits for the end."""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import logging
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from paged_core import AsyncEngine, ConfigError, Engine, EngineBusyError, EngineConfig, EngineDeadError
from paged_openai.app import AppOptions, create_app
from paged_openai.connection import ConnectionLimits
from paged_openai.keys import read_keys
from paged_openai.logs import log_to_stderr
from paged_openai.server import Server
from paged_openai.service import Service
from paged_openai.spellings import check_reasoning
from paged_openai.tracing import open_traces
from paged_serving import KVEvents, PrometheusMetrics, RequestLimits, ServedModel

_log = logging.getLogger("paged_openai")
_LAST_STEP_S = 5.0  # for the last step when all calls have ended
_BODIES_AT_ONCE = 32  # of the largest size


def serve(args: argparse.Namespace, config: EngineConfig, limits: RequestLimits) -> int:
    """Returns the exit status: 0 after a signal, 1 if the port can't be had."""
    options, tls = _app_options(args), _tls(args)  # so that their errors are reported before the model is loaded
    _check_address(args.host, args.port)
    log_to_stderr(args.log_level)
    allow_many_connections()
    names = args.served_model_name or [str(args.model)]
    options = replace(options, traces=open_traces(names[0]))
    metrics = PrometheusMetrics(names[0])
    _log.info("loading", extra={"fields": {"model": str(args.model)}})
    events = _kv_events(args)
    engine = Engine(args.model, config, plugins=[metrics, *events], device=args.device, dtype=args.dtype)
    metrics.describe(engine)
    served_engine = AsyncEngine(
        engine, tokenizer=_tokenizer(engine, args), max_requests=_max_requests(engine, args.max_queue)
    )
    try:
        served = _served_model(served_engine, names, limits, args)
        service = Service(
            served_engine, served,
            max_queue=args.max_queue, max_unread_bytes=_BODIES_AT_ONCE * args.max_body_bytes,
            timeout_s=args.request_timeout, step_timeout_s=args.step_timeout,
        )  # fmt: skip
        server = Server(
            create_app(service, metrics, options), service,
            shutdown_timeout_s=args.shutdown_timeout, limits=ConnectionLimits(max_connections=args.max_connections),
            keep_alive_s=args.timeout_keep_alive, host=args.host, port=args.port, **tls,
        )  # fmt: skip
        _log.info("serving", extra={"fields": _facts(engine, served, args)})
        with short_collections():
            server.run()
        if config.kv_disk_path is not None:
            _save(served_engine, server.seconds_left)
    except SystemExit:  # uvicorn exits if the port can't be bound, and has logged why
        return 1
    finally:
        if options.traces is not None:
            options.traces.close()
        _close(served_engine)
        for each in events:
            each.close()
    return 0


@contextmanager
def short_collections() -> Iterator[None]:
    """Python's collector leaves alone what is there now: looking at a million objects of torch and of the model takes
    0.3 s, in which no stream gets on."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _served_model(
    engine: AsyncEngine, names: list[str], limits: RequestLimits, args: argparse.Namespace
) -> ServedModel:
    """The model as clients see it, with what its first grammar needs."""
    served = ServedModel(
        engine, names, limits,
        model_defaults=args.generation_config == "auto", strict_fields=args.strict_fields,
        response_template=args.response_template, template_options=args.default_chat_template_kwargs,
        reasoning=_reasoning(args),
    )  # fmt: skip
    check_reasoning(args.reasoning_parser, served.response_template)
    served.prepare_grammars()
    return served


def _reasoning(args: argparse.Namespace) -> bool | None:
    """The argument of ServedModel. A named reasoning parser means that the model reasons."""
    return False if args.reasoning == "off" else args.reasoning_parser is not None or None


def _kv_events(args: argparse.Namespace) -> list[KVEvents]:
    if args.kv_events is None:
        if args.kv_events_replay is not None:
            raise ConfigError("--kv-events-replay needs --kv-events, which says where events are told at first")
        return []
    return [KVEvents(args.kv_events, args.kv_events_replay, form=args.kv_events_format)]


def _tokenizer(engine: Engine, args: argparse.Namespace) -> Any:
    """The model's own tokenizer, or that of ``--tokenizer`` and ``--chat-template``. None: there is none."""
    tokenizer = engine.tokenizer if args.tokenizer is None else engine.tokenizer_of(args.tokenizer)
    if args.tokenizer is not None and tokenizer is None:
        raise ConfigError(f"--tokenizer {args.tokenizer}: no tokenizer is found there; give a folder or a hub id")
    if args.chat_template is not None:
        if tokenizer is None:
            raise ConfigError("--chat-template needs a tokenizer; give --tokenizer, too")
        tokenizer.chat_template = _template(args.chat_template)
    return tokenizer


def _template(given: str) -> str:
    """The content of a file, or the text itself, which then contains braces."""
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template can't be read: {error}; give a file, or a template's text") from error


def _facts(engine: Engine, served: ServedModel, args: argparse.Namespace) -> dict[str, Any]:
    """The summary that is logged at the start."""
    sizes, spec = engine.sizes, engine.spec
    host = f"[{args.host}]" if ":" in args.host else args.host
    scheme = "https" if args.ssl_certfile is not None else "http"
    return {
        "model": served.names[0],
        "url": f"{scheme}://{host}:{args.port}{args.root_path}",
        "dtype": str(spec.dtype).removeprefix("torch."),
        "device": str(spec.device),
        "attention_backend": engine.attention_backend,
        "kv_dtype": str(sizes.kv_dtype).removeprefix("torch."),
        "kv_bytes": engine.memory.num_bytes,
        "kv_tokens": sizes.num_blocks * sizes.block_size,
        "max_model_len": sizes.max_model_len,
        "max_num_seqs": sizes.max_num_seqs,
        "sampling_defaults": dict(served.defaults),
    }


def _max_requests(engine: Engine, max_queue: int) -> int:
    """The requests served at once, and as many whose clients have left, because the engine drops those only between
    steps."""
    return 2 * (engine.sizes.max_num_seqs + max_queue)


def _save(engine: AsyncEngine, seconds: float) -> None:
    """Write K/V worth keeping from the prefix cache to the tiers."""
    with suppress(EngineDeadError, EngineBusyError, TimeoutError, concurrent.futures.TimeoutError):
        engine.look(lambda each: each.save_prefix_cache(seconds)).result(seconds + _LAST_STEP_S)


def _close(engine: AsyncEngine) -> None:
    """Close the engine. Python can't exit while a thread is inside a step; if the step doesn't end, the process exits
    without it."""
    try:
        engine.close(_LAST_STEP_S)
    except TimeoutError as error:
        _log.error("leaving a stuck engine: %s", error)
        logging.shutdown()
        os._exit(1)


def _app_options(args: argparse.Namespace) -> AppOptions:
    keys = list(args.api_key)
    if any(not key for key in keys):
        raise ConfigError("--api-key is empty; leave it out to let everybody in")
    if args.api_key_file is not None:
        keys += read_keys(args.api_key_file)
    return AppOptions(
        api_keys=tuple(keys),
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=args.max_body_bytes,
        body_timeout_s=args.body_timeout,
        tgi_chat_stream=args.tgi_chat_stream,
        log_prompts=args.log_prompts,
        page=args.page,
        root_path=args.root_path,
        max_stored_responses=args.max_stored_responses,
    )


def _check_address(host: str, port: int) -> None:
    """Raises ConfigError for an address that can't be bound now; uvicorn would report it only after the model is
    loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name == "posix":  # as asyncio does, so that a port with just closed connections can be bound
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"the server can't listen on {host}, port {port}: {error}; choose another") from error


def _tls(args: argparse.Namespace) -> dict[str, Any]:
    if args.ssl_certfile is None:
        if args.ssl_keyfile is not None or args.ssl_ca_certs is not None:
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return {}
    for path in (args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path} doesn't exist")
    tls = {"ssl_certfile": args.ssl_certfile, "ssl_keyfile": args.ssl_keyfile}
    if args.ssl_ca_certs is not None:
        tls |= {"ssl_ca_certs": str(args.ssl_ca_certs), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return tls


def allow_many_connections() -> None:
    """Raise the limit of open files, usually 1024, to the system's maximum, because each stream is one."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # "unlimited" isn't accepted everywhere
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

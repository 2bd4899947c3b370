"""From options to a server that runs: builds the engine, the service and the application, and waits for the end."""

from __future__ import annotations

import argparse
import concurrent.futures
import logging
import os
import socket
import ssl
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

from paged_core import AsyncEngine, ConfigError, Engine, EngineBusyError, EngineConfig, EngineDeadError
from paged_openai.app import AppOptions, create_app
from paged_openai.connection import ConnectionLimits
from paged_openai.keys import read_keys
from paged_openai.logs import log_to_stderr
from paged_openai.server import Server
from paged_openai.service import Service
from paged_openai.tracing import open_traces
from paged_serving import KVEvents, PrometheusMetrics, RequestLimits, ServedModel

_log = logging.getLogger("paged_openai")
_LAST_STEP_S = 5.0  # for the step under way when all is over
_BODIES_AT_ONCE = 32  # of the largest size


def serve(args: argparse.Namespace, config: EngineConfig, limits: RequestLimits) -> int:
    """Returns the exit status: 0 after a signal, 1 if the port can't be had."""
    options, tls = _app_options(args), _tls(args)  # what is wrong with them is told before the model is loaded
    _check_address(args.host, args.port)
    log_to_stderr(args.log_level)
    allow_many_connections()
    names = args.served_model_name or [str(args.model)]
    options = replace(options, traces=open_traces(names[0]))
    metrics = PrometheusMetrics(names[0])
    _log.info("loading", extra={"fields": {"model": str(args.model)}})
    events = _kv_events(args)
    engine = Engine(args.model, config, plugins=[metrics, *events], device=args.device, dtype=args.dtype)
    served_engine = AsyncEngine(engine, max_requests=_max_requests(engine, args.max_queue))
    try:
        served = ServedModel(
            served_engine, names, limits,
            model_defaults=args.generation_config == "auto", strict_fields=args.strict_fields,
        )  # fmt: skip
        service = Service(
            served_engine, served,
            max_queue=args.max_queue, max_unread_bytes=_BODIES_AT_ONCE * args.max_body_bytes,
            timeout_s=args.request_timeout, step_timeout_s=args.step_timeout,
        )  # fmt: skip
        server = Server(
            create_app(service, metrics, options), service,
            shutdown_timeout_s=args.shutdown_timeout, limits=ConnectionLimits(max_connections=args.max_connections),
            host=args.host, port=args.port, **tls,
        )  # fmt: skip
        facts = {"model": names[0], "host": args.host, "port": args.port, "sampling_defaults": dict(served.defaults)}
        _log.info("serving", extra={"fields": facts})
        server.run()
        if config.kv_disk_path is not None:
            _save(served_engine, server.seconds_left)
    except SystemExit:  # uvicorn's way of saying that the port can't be had; it has logged why
        return 1
    finally:
        if options.traces is not None:
            options.traces.close()
        _close(served_engine)
        for each in events:
            each.close()
    return 0


def _kv_events(args: argparse.Namespace) -> list[KVEvents]:
    if args.kv_events is None:
        if args.kv_events_replay is not None:
            raise ConfigError("--kv-events-replay needs --kv-events, which says where events are told at first")
        return []
    return [KVEvents(args.kv_events, args.kv_events_replay, form=args.kv_events_format)]


def _max_requests(engine: Engine, max_queue: int) -> int:
    """Those that are served at once, and as many whose clients have left: the engine hears of these between steps."""
    return 2 * (engine.sizes.max_num_seqs + max_queue)


def _save(engine: AsyncEngine, seconds: float) -> None:
    """What is worth keeping of the prefix cache, to where K/V outlive the process."""
    with suppress(EngineDeadError, EngineBusyError, TimeoutError, concurrent.futures.TimeoutError):
        engine.look(lambda each: each.save_prefix_cache(seconds)).result(seconds + _LAST_STEP_S)


def _close(engine: AsyncEngine) -> None:
    """Python can't end under a thread that is inside a step: if that doesn't end, the process goes without it."""
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
    )


def _check_address(host: str, port: int) -> None:
    """Raises ConfigError for one that can't be had now. uvicorn would say so when the model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name == "posix":  # as asyncio does: ports of connections that have just ended may be taken
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
    """As many open files as the system lets us have: each stream is one, and the usual limit is 1024."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # "unlimited" isn't taken everywhere
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

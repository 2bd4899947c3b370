"""``paged ray serve``: its options. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from paged_core import Commands, ConfigError, PagedCoreError
from paged_ray.settings import ROUTINGS, Settings
from paged_serving import add_engine_options, add_load_options, engine_config, whole_number

_DEFAULTS = {each.name: each.default for each in fields(Settings)}


def register(commands: Commands) -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser(
        "ray",
        help="serve a model with Ray Serve: several replicas, on one machine or many",
        description="Serve a model with Ray Serve: several replicas, on one machine or many.",
    )
    parser.set_defaults(run=lambda args: parser.print_help())  # each subcommand has its own instead
    add_commands(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """The same as a program of its own. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="paged_ray", description="Serve a model with Ray Serve.")
    add_commands(parser)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except PagedCoreError as error:
        print(f"paged_ray: {error}", file=sys.stderr)
        return 2


def add_commands(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "serve",
        help="start replicas, and serve a model over HTTP until a signal comes",
        description="Start replicas, and serve a model over HTTP until a signal comes.",
    )
    add = serving.add_argument
    add("model", metavar="MODEL", help="a folder that every node has, a hub id, a GGUF file, or smollm2")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only; 0.0.0.0: all)",
    )
    add("--port", type=whole_number, default=8000, metavar="N", help="port to listen on (default: %(default)s)")
    add("--address", metavar="HOST:PORT", help="use this Ray cluster (default: start one here)")
    add("--served-model-name", nargs="+", default=(), metavar="NAME",
        help="names that clients may use for the model (default: MODEL)")  # fmt: skip
    _add_replicas(serving.add_argument_group("replicas"))
    engine = serving.add_argument_group("engine")
    add_load_options(engine)
    add_engine_options(engine, defaults={"gpu_memory_utilization": 0.9})
    serving.set_defaults(run=serve)


def _add_replicas(group: Any) -> None:
    add = group.add_argument
    add("--replicas", type=whole_number, default=1, metavar="N", help="number of engines (default: %(default)s)")
    add("--max-replicas", type=whole_number, metavar="N",
        help="most engines that autoscaling may start (default: no autoscaling)")  # fmt: skip
    add("--target-requests", type=float, default=_DEFAULTS["target_requests"], metavar="N",
        help="requests per replica, above which replicas are added (default: %(default)s)")  # fmt: skip
    add("--routing", choices=ROUTINGS, default="prefix",
        help="send a request to the replica that has cached the beginning of its prompt, or to the less busy one "
             "(default: %(default)s)")  # fmt: skip
    add(
        "--cpus-per-replica", type=float, default=1.0, metavar="N", help="CPUs that Ray reserves (default: %(default)s)"
    )
    add(
        "--gpus-per-replica", type=float, default=0.0, metavar="N", help="GPUs that Ray reserves (default: %(default)s)"
    )
    add("--max-queue", type=whole_number, default=_DEFAULTS["max_queue"], metavar="N",
        help="most sequences that wait in a replica; further requests are refused (default: %(default)s)")  # fmt: skip
    add("--drain", type=float, default=_DEFAULTS["drain_s"], metavar="S",
        help="time for requests to finish when their replica is removed, in s (default: %(default)s)")  # fmt: skip
    add("--strict-fields", action="store_true",
        help="refuse unknown fields of requests (default: ignore them; x-ignored-fields names them)")  # fmt: skip


def serve(args: argparse.Namespace) -> int:
    """Start the replicas, then serve until a signal comes."""
    told = Settings(
        str(args.model), names=tuple(args.served_model_name), replicas=args.replicas, max_replicas=args.max_replicas,
        target_requests=args.target_requests, routing=args.routing, cpus_per_replica=args.cpus_per_replica,
        gpus_per_replica=args.gpus_per_replica, device=args.device, dtype=args.dtype, engine=engine_config(args),
        max_queue=args.max_queue, drain_s=args.drain, strict_fields=args.strict_fields,
    )  # fmt: skip
    try:
        from paged_ray import serving
    except ImportError as error:
        raise ConfigError(f"{error}; Ray Serve needs more: pip install 'paged-core[ray]'") from error
    return serving.serve(told, args.host, args.port, args.address)

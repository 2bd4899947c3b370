"""The engine's own scheduler, block pool and router in simulated time: latencies of many requests on many replicas.

python benchmarks/simulate.py run --requests 1000000 --replicas 64 --rate 400,600,800 --prefixes 64 --prefix-tokens 512
python benchmarks/simulate.py fit smollm2 --out costs.json     # what steps cost on this machine
python benchmarks/simulate.py compare smollm2                  # beside real runs of three workloads
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from paged_core import PagedCoreError
from paged_ray.placement import OPEN_COST
from paged_simulation import costs as cost_models
from paged_simulation.fleet import ROUTINGS, Fleet, simulate
from paged_simulation.replica import Sizes
from paged_simulation.report import differences, figures, plot, table
from paged_simulation.traffic import Trace, Traffic

_SWEPT = ("rate", "replicas", "routing", "blocks", "batched_tokens", "watermark")  # options that take several values


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="simulate; options that take lists are tried in all combinations"))
    _add_fit(commands.add_parser("fit", help="run a model here, and write the costs of its steps"))
    _add_compare(commands.add_parser("compare", help="simulate three workloads, and run them too"))
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except PagedCoreError as error:
        print(f"simulate.py: {error}", file=sys.stderr)
        return 2


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("traffic").add_argument
    add("--requests", type=int, metavar="N", help="number of requests (default: 10000; of a trace, all)")
    add("--rate", type=_floats, default=None, metavar="R,...",
        help="requests that arrive per second, as a Poisson process (default: 10 per replica; of a trace, its own "
             "arrival times); inf: all at once")  # fmt: skip
    add("--trace", type=Path, metavar="FILE", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    add("--prefixes", type=int, default=0, metavar="N",
        help="number of common beginnings of prompts, some frequent, some rare (default: %(default)s)")  # fmt: skip
    add("--prefix-tokens", type=int, default=512, metavar="N",
        help="tokens of each common beginning (default: %(default)s)")  # fmt: skip
    add("--prompt-median", type=float, default=140, metavar="N",
        help="median tokens of a prompt, without the common beginning (default: %(default)s)")  # fmt: skip
    add("--output-median", type=float, default=125, metavar="N", help="median tokens of output (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the traffic (default: %(default)s)")
    add = parser.add_argument_group("replicas").add_argument
    add("--replicas", type=_integers, default=[1], metavar="N,...", help="number of replicas, 1 to 1000 (default: 1)")
    add("--routing", type=_names, default=["prefix"], metavar="NAME,...",
        help=f"how a replica is chosen: {', '.join(ROUTINGS)} (default: prefix)")  # fmt: skip
    add("--open-cost", type=int, default=OPEN_COST, metavar="N",
        help="cost of an open request in tokens, with routing by prefix (default: %(default)s)")  # fmt: skip
    add("--blocks", type=_integers, default=[20_000], metavar="N,...", help="K/V blocks per replica (default: 20000)")
    add("--block-size", type=int, default=16, metavar="N", help="tokens per block (default: %(default)s)")
    add("--max-num-seqs", type=int, default=256, metavar="N",
        help="most sequences that run at once in a replica (default: %(default)s)")  # fmt: skip
    add(
        "--batched-tokens",
        type=_integers,
        default=[2048],
        metavar="N,...",
        help="most tokens of a step (default: 2048)",
    )
    add("--watermark", type=_floats, default=[0.01], metavar="X,...", help="share of blocks kept free (default: 0.01)")
    add("--no-prefix-caching", action="store_true", help="replicas have no prefix cache")
    add("--costs", type=Path, metavar="FILE",
        help="costs of steps, as fit writes them (default: those of an 8B model on an H200)")  # fmt: skip
    _add_output(parser)
    parser.set_defaults(run=_run)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the costs")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the requests (default: %(default)s)")
    _add_real(parser)
    parser.set_defaults(run=_fit)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")
    parser.add_argument("--costs", type=Path, metavar="FILE",
        help="costs of steps, as fit writes them (default: they are fitted first)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the requests (default: %(default)s)")
    _add_real(parser)
    _add_output(parser)
    parser.set_defaults(run=_compare)


def _add_real(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=32, metavar="N",
        help="requests of each workload (default: %(default)s)")  # fmt: skip
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall",
        help="how the time of a step is measured; processor time is for one thread on a busy machine "
             "(default: %(default)s)")  # fmt: skip


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a chart (needs matplotlib)")


def _run(args: argparse.Namespace) -> None:
    costs = cost_models.H200_8B if args.costs is None else cost_models.read(args.costs)
    if args.rate is None:
        args.rate = [None] if args.trace is not None else [10.0 * args.replicas[0]]
    gc.disable()  # requests leave no reference cycles, and there are many of them
    found: dict[str, Any] = {}
    for values in product(*(getattr(args, name) for name in _SWEPT)):
        choice = dict(zip(_SWEPT, values, strict=True))
        began = time.process_time()
        outcome = simulate(_traffic(args, choice).arrivals(), _fleet(args, choice), costs, _progress)
        used = {"cpu_s": time.process_time() - began,
                "max_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # fmt: skip
        found[_name_of(args, choice)] = {**choice, **figures(outcome), **used}
        gc.collect()
    _tell(args, found, {"costs": str(costs)})


def _fit(args: argparse.Namespace) -> None:
    from paged_simulation import real

    costs = real.fitted(args.model, args.seed, args.clock, args.requests)
    cost_models.write(costs, args.out)
    print(costs)


def _compare(args: argparse.Namespace) -> None:
    from paged_simulation import real

    how = args.clock, args.requests
    costs = real.fitted(args.model, 1, *how) if args.costs is None else cost_models.read(args.costs)
    found = real.compared(args.model, costs, args.seed, *how)
    print(differences(found))
    _write(args, found, {"costs": str(costs)})


def _traffic(args: argparse.Namespace, choice: dict[str, Any]) -> Traffic | Trace:
    shared = {"seed": args.seed, "num_prefixes": args.prefixes, "prefix_tokens": args.prefix_tokens}
    if args.trace is not None:
        return Trace(args.trace, args.requests, choice["rate"], **shared)
    return Traffic(args.requests or 10_000, choice["rate"], prompt_median=args.prompt_median,
                   output_median=args.output_median, **shared)  # fmt: skip


def _fleet(args: argparse.Namespace, choice: dict[str, Any]) -> Fleet:
    sizes = Sizes(
        choice["blocks"], args.block_size, args.max_num_seqs, choice["batched_tokens"],
        watermark=choice["watermark"], enable_prefix_caching=not args.no_prefix_caching,
    )  # fmt: skip
    return Fleet(sizes, choice["replicas"], choice["routing"], args.open_cost, seed=args.seed)


def _name_of(args: argparse.Namespace, choice: dict[str, Any]) -> str:
    """``line @ place``: the first option with several values gives the place, the others the line."""
    several = [name for name in _SWEPT if len(getattr(args, name)) > 1]
    if not several:
        return "simulated"
    line = ", ".join(f"{name} {choice[name]}" for name in several[1:]) or several[0]
    return f"{line} @ {choice[several[0]]:g}" if isinstance(choice[several[0]], int | float) else (
        f"{line} @ {choice[several[0]]}")  # fmt: skip


def _tell(args: argparse.Namespace, found: dict[str, Any], facts: dict[str, Any]) -> None:
    print(table(found))
    _write(args, found, facts)


def _write(args: argparse.Namespace, found: dict[str, Any], facts: dict[str, Any]) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps({"command": sys.argv, **facts, "outcomes": found}, indent=1) + "\n")
    if args.plot is not None:
        several = [name for name in _SWEPT if len(getattr(args, name, [])) > 1]
        plot(found, args.plot, several[0] if several else "")


def _progress(number: int, at_s: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{number:,} requests, {at_s:,.0f} s simulated", end="", file=sys.stderr, flush=True)


def _integers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())

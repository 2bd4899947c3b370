"""Other tile sizes for the attention kernels, which were chosen without a GPU: which is fastest on this one.

    python benchmarks/bench_gpu_tiles.py [--json PATH]

The fastest belongs into ``paged_kernels/triton/tiles.py``. Sizes that don't compile or fit are left out, with a
message.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gpu_attention_step import LLAMA_8B, TINY, AttentionStep
from gpu_race import copy_bandwidth, device_name, race, write
from paged_kernels.triton import tiles

Changes = list[dict[str, int]]

_DECODE: Changes = [
    {},
    {"BLOCK_N": 32, "num_stages": 7},
    {"BLOCK_N": 32, "num_stages": 5},
    {"BLOCK_N": 64, "num_stages": 3},
]
_PREFILL: Changes = [
    {},
    {"BLOCK_N": 128, "num_stages": 3},
    {"BLOCK_M": 64, "num_warps": 4, "num_stages": 3},
]
# Requests, keys per request, queries per request, changes per tile.
_CASES = [(64, 4096, 1, "decode", _DECODE), (1, 32768, 1, "decode", _DECODE), (8, 2048, 2048, "prefill", _PREFILL)]
_TINY_CASES = [(2, 40, 1, "decode", _DECODE[:2]), (2, 40, 40, "prefill", _PREFILL[:2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="replays of each (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few tokens: to see that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device = torch.device(options.device)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(options.device)
    print(f"{device_name(options.device)}, copies {bandwidth / 1e9:.0f} GB/s")
    heads, cases = (TINY, _TINY_CASES) if options.tiny else (LLAMA_8B, _CASES)
    rows: list[dict[str, Any]] = []
    for requests, context, queries, kind, changes in cases:
        step = AttentionStep(requests, context, queries, heads, torch.bfloat16, options.device)
        print(f"\n{kind} {requests} x {queries} of {context}")
        for change in changes:
            seconds = timed(step, kind, change, options)
            result = "failed" if seconds is None else f"{1e6 * seconds:.1f} us"
            print(f"  {change or 'as chosen'}: {result}", flush=True)
            if seconds is not None:
                rows.append({"case": [requests, context, queries], "kind": kind, "change": change, "us": 1e6 * seconds})
        if options.json:  # after each case: an interrupted run keeps its results
            write(options.json, options.device, bandwidth, rows)


def timed(step: AttentionStep, kind: str, change: dict[str, int], options: argparse.Namespace) -> float | None:
    """Seconds per layer with these changes of its tile; None if it can't run."""
    chosen = getattr(tiles, kind)
    with patch.object(tiles, kind, lambda *shape: {**chosen(*shape), **change}):
        run = step.paged()
    try:
        run()  # compiled here: not in a capture
    except Exception as error:
        print(f"  ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        return None
    return race({"paged": run}, options.repeats, options.device, step.num_layers)["paged"]


if __name__ == "__main__":
    main()

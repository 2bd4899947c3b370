"""The results of benchmarks/gpu.sh as a short table beside the targets: python benchmarks/gpu_table.py FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    kernels, *models = (_read(folder / f"gpu-{name}.json") for name in ("kernels", "offline-7b", "offline-13b"))
    device = next((found["device"] for found in (kernels, *models) if found), "nothing was measured")
    print(device)
    for row in kernels.get("rows", []):
        if row["part"] == "decode":
            what = f"decode {row['rows']} x {row['context']}, heads {row['heads']}, {row['cache']}"
            target = {(64, "bfloat16"): " (target 80 %)", (1, "bfloat16"): " (target 60 %)"}
            wanted = target.get((row["rows"], row["cache"]), "") if row["context"] >= 4096 else ""
            print(f"{what}: {row['us']:.0f} us, {row['of copy']:.0%} of copy bandwidth{wanted}{_rivals(row)}")
        if row["part"] == "prefill":
            share = f", {row['of sdpa']:.0%} of SDPA (target 60 %)" if "of sdpa" in row else ""
            what = f"prefill {row['requests']} x {row['queries']} of {row['context']}, heads {row['heads']}"
            print(f"{what}: {row['paged TFLOP/s']:.0f} TFLOP/s{share}")
    for row in _read(folder / "gpu-flex.json").get("rows", []):
        what = f"{row['rows']} x {row['queries']} of {row['context']}, heads {row['heads']}"
        print(f"{what}: {row['paged us']:.0f} us{_rivals(row)}")
    for name, model in [named for found in models for named in found.get("models", {}).items()]:
        step = model["decode"] or {}
        times = f"{model['times']:.1f}x stock's best batch (target 14x)" if model["times"] else "stock has no figure"
        print(f"{name}: {model['paged_tokens_per_s']:.0f} tok/s, {times}")
        if step:
            print(f"  decode step of {step['rows']} rows: {step['of_floor']:.0%} of its memory floor (target 80 %)")


def _rivals(row: dict[str, Any]) -> str:
    return "".join(f"; {name[:-3]} {taken:.0f} us" for name, taken in row.items() if name in ("sdpa us", "flex us"))


def _read(path: Path) -> dict[str, Any]:
    """Empty if the part didn't run."""
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    main()

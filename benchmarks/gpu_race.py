"""Timing on a GPU: rivals in turn, each in a CUDA graph if it is ours; the device's copy speed; results as a file."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

Work = Callable[[], Any]
_HEAD_START = 4_000_000  # cycles: about 2 ms, during which the host launches the timed work
_RIVALS = ("sdpa", "flex", "torch")  # torch's, which may fail


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy much larger than the caches."""
    num_bytes = (4 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / race({"copy": lambda: target.copy_(source)}, 10, device)["copy"]


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} (not a GPU)"


def race(rivals: dict[str, Work], repeats: int, device: torch.device, per: int = 1) -> dict[str, float]:
    """Median seconds of each, divided by ``per``. One of torch's that fails is left out, with a message."""
    ready: dict[str, Work] = {}
    for name, run in rivals.items():
        if name not in _RIVALS:
            ready[name] = _captured(run) if device.type == "cuda" else run
            continue
        try:
            for _ in range(3):
                run()
            ready[name] = run
        except Exception as error:
            print(f"  ({name} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__})")
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, run in ready.items():
            times[name].append(_timed(run, device))
    return {name: median(found) / per for name, found in times.items()}


def write(path: Path, device: torch.device, bandwidth: float, rows: list[dict[str, Any]]) -> None:
    about = {
        "device": device_name(device),
        "copy_bytes_per_s": bandwidth,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
    }
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def _captured(run: Work) -> Work:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def _timed(run: Work, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3

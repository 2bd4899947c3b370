"""A Ray cluster on this machine only, as small as possible, that ends with the process that has started it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from free_ports import free_ports

_ATTEMPTS = 5
_START_LIMIT_S, _END_LIMIT_S = 120.0, 60.0
_PORTS = ("--port", "--dashboard-agent-grpc-port", "--dashboard-agent-listen-port", "--runtime-env-agent-port",
          "--metrics-export-port", "--node-manager-port", "--object-manager-port")  # fmt: skip
_TOLD = {"metrics_agent_port": "--dashboard-agent-grpc-port", "metrics_export_port": "--metrics-export-port",
         "dashboard_agent_listen_port": "--dashboard-agent-listen-port",
         "runtime_env_agent_port": "--runtime-env-agent-port"}  # fmt: skip
_ENVIRONMENT = {
    "RAY_raylet_start_wait_time_s": "200",
    "RAY_agent_register_timeout_ms": "200000",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


class Cluster(NamedTuple):
    address: str
    head: int  # the process that has started all others

    def processes(self) -> list[int]:
        """Return all processes of the cluster except the head."""
        return descendants(self.head)


@contextmanager
def ray_cluster(num_cpus: int = 2) -> Iterator[Cluster]:
    """A cluster that runs as long as the block. None of its processes outlives the block."""
    os.environ.update(_ENVIRONMENT)  # processes that connect need the token
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a short path, because sockets are in it
    head = None
    try:
        for attempt in range(_ATTEMPTS):
            ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
            place = folder / str(attempt)
            head = _start(place, ports, num_cpus)
            if _is_up(head, place, ports):
                break
            _end(head)
        else:
            raise AssertionError((place / "log").read_text(errors="replace")[-3000:])
        yield Cluster(f"127.0.0.1:{ports['--port']}", head.pid)
    finally:
        left = _end(head) if head is not None else []
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, "processes of the cluster didn't end by themselves"


def _start(place: Path, ports: dict[str, int], num_cpus: int) -> subprocess.Popen[bytes]:
    place.mkdir()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false",
        "--disable-usage-stats", f"--num-cpus={num_cpus}", "--object-store-memory=80000000",
        f"--temp-dir={place}", *(f"{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (place / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _is_up(head: subprocess.Popen[bytes], place: Path, ports: dict[str, int]) -> bool:
    """Wait until the cluster is up. Returns False if it can't start."""
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and head.poll() is None:
        if b"Ray runtime started" in (place / "log").read_bytes():
            return True
        for told in place.glob("session_2*/logs/raylet.out"):
            text = told.read_bytes()
            if b"Check failed" in text:
                return False
            for node in re.findall(rb"node_id=(\w+)", text)[:1]:
                _tell_ports(told.parent.parent, node.decode(), ports)
        time.sleep(0.1)
    return False


def _tell_ports(session: Path, node: str, ports: dict[str, int]) -> None:
    """Write the ports in place of the agents. A raylet ends if they don't report theirs in 15 seconds, as happens on a
    busy machine."""
    for name, option in _TOLD.items():
        file = session / f"{name}_{node}"
        if not file.exists():
            file.write_text(str(ports[option]))


def _end(head: subprocess.Popen[bytes]) -> list[int]:
    """End the cluster. Returns those of its processes that had to be killed."""
    all_of_it = descendants(head.pid)
    head.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _END_LIMIT_S
    while (left := [pid for pid in all_of_it if _is_alive(pid)]) and time.monotonic() < deadline:
        head.poll()
        time.sleep(0.1)
    for pid in (*left, head.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait(30)
    return left


def descendants(ancestor: int) -> list[int]:
    """Return the processes that a process has started, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = [], [ancestor]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

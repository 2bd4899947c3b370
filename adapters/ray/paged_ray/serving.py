"""From settings to an application that runs in a Ray cluster, until a signal comes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import ExitStack
from functools import partial
from types import FrameType

import ray
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from paged_core import ConfigError
from paged_ray.app import bind
from paged_ray.settings import Settings

_APP = "paged"
_DEPLOYED = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOY_FAILED)
_LOOK_S = 0.5
_KNOCK_S = 10.0
_FORCE_STOP = "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"  # else who waits for a stuck one waits until drain_s is over
_log = logging.getLogger("paged_ray")


def serve(told: Settings, host: str, port: int, address: str | None = None) -> int:
    """Returns the exit status: 0 after a signal, 1 if the replicas could not be started.

    Raises:
        ConfigError: the port is in use, the cluster can't be reached, or has no room for the replicas.
    """
    ended = threading.Event()
    if address is None:
        _check_port(host, port)
    with ExitStack() as stack:
        _connect(address)
        stack.callback(ray.shutdown)
        _check_room(told)
        stack.callback(ray_serve.shutdown if address is None else partial(ray_serve.delete, _APP))
        _end_with_signals(ended)
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve._run(bind(told), name=_APP, _blocking=False)
        trouble = _wait_until_deployed(ended)
        if trouble is not None:
            _log.error("the replicas can't be started: %s", trouble)
            return 1
        if not ended.is_set():
            print(f"serving {told.served_names[0]} on http://{host}:{port}", flush=True)
        ended.wait()
    return 0


def _connect(address: str | None) -> None:
    """To the cluster at ``address``, or to one that is started here, for this application alone."""
    if address is None:
        os.environ.setdefault(_FORCE_STOP, "1")  # the controller, which Ray starts from here, reads it
        ray.init("local", include_dashboard=False)
        return
    try:
        _knock(address)
        ray.init(address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}; leave --address out to start one") from error


def _knock(address: str) -> None:
    """Raises OSError or ValueError if no cluster answers; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "//" not in address:  # else it is a name that Ray knows, as "auto"
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


def _check_room(told: Settings) -> None:
    """Raises ConfigError for replicas that don't fit the cluster; Ray itself would wait for more nodes forever."""
    there = ray.cluster_resources()
    for what, each, option in (("CPU", told.cpus_per_replica, "cpus"), ("GPU", told.gpus_per_replica, "gpus")):
        wanted, has = told.replicas * each, there.get(what, 0.0)
        if wanted > has:
            raise ConfigError(
                f"{told.replicas} replicas with {each:g} {what}s each need {wanted:g}, and the cluster has {has:g}; "
                f"lower --replicas or --{option}-per-replica, or add nodes"
            )


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError for a port that can't be bound now; Ray's proxies would report it only after the models are
    loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"the server can't listen on {host}, port {port}: {error}; choose another") from error


def _end_with_signals(ended: threading.Event) -> None:
    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


def _wait_until_deployed(ended: threading.Event) -> str | None:
    """The error, if the replicas can't be started."""
    while not ended.wait(_LOOK_S):
        try:
            app = ray_serve.status().applications.get(_APP)
        except RayServeException as error:
            return str(error)
        if app is not None and app.status in _DEPLOYED:
            return app.message if app.status == ApplicationStatus.DEPLOY_FAILED else None
    return None

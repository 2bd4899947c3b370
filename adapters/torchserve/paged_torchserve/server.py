"""A TorchServe process: its files, its start, the wait for its models, and its end."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paged_core import ConfigError, PagedCoreError
from paged_torchserve.contents import check_contents, read_text
from paged_torchserve.inquiries import Addresses, Inquiries
from paged_torchserve.java import find_java
from paged_torchserve.reading import MANIFEST
from paged_torchserve.worker_log import Patience, causes, last_words

_POLL_S = 0.2
_CAUSE_S = 5.0
_METRICS_S = 1.2  # a little more than the interval between updates of metrics
_SOCKET, _MAX_SOCKET_PATH = ".ts.sock.65535", 103  # in bytes; Linux takes 107, macOS 103
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LOGGING = Path(__file__).with_name("log4j2.xml")


class ServerError(PagedCoreError):
    """TorchServe did not start, or a model did not load."""


@dataclass(frozen=True)
class ServerOptions:
    addresses: Addresses = field(default_factory=Addresses)
    token_auth: bool = False
    model_api: bool = False
    properties: Mapping[str, str] = field(default_factory=dict)
    java: Path | None = None


class TorchServe:
    """A server in a process of its own. Its logs, temporary files and keys are in ``workdir``.

    ``with TorchServe([archive], workdir, options) as server: server.wait_until_ready(60)``

    Raises:
        ConfigError: an archive can't be used, or TorchServe or Java isn't installed.
    """

    def __init__(self, archives: Sequence[Path], workdir: Path, options: ServerOptions | None = None) -> None:
        if find_spec("ts") is None:
            raise ConfigError("TorchServe isn't installed: pip install 'paged-core[torchserve]'")
        self.options = options or ServerOptions()
        self.workdir = workdir.resolve()
        key_file = self.workdir / "key_file.json" if self.options.token_auth else None
        self.inquiries = Inquiries(self.options.addresses, key_file)
        self.models = dict(_model_name(path) for path in archives)
        if len(self.models) < len(archives):
            raise ConfigError("two archives bring a model of the same name; register the second one through the API")
        java = find_java(self.options.java)
        temp, store = self.workdir / "tmp", self.workdir / "model-store"
        if len(os.fsencode(temp / _SOCKET)) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"the path of {self.workdir} is too long for the sockets of TorchServe's workers; give a shorter one "
                "(--workdir, or TMPDIR)"
            )
        for folder in (temp, store):
            folder.mkdir(parents=True, exist_ok=True)
        for link, target in self.models.items():
            _link(store / (link + _suffix(target)), target)
        properties = self.workdir / "config.properties"
        properties.write_text(_properties(self.options), encoding="utf-8")
        command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--no-config-snapshots",
                   "--ts-config", str(properties), "--log-config", str(_LOGGING),
                   "--model-store", str(store)]  # fmt: skip
        command += [] if self.options.token_auth else ["--disable-token-auth"]
        command += ["--enable-model-api"] if self.options.model_api else []
        command += ["--models", *(f"{name}={name}{_suffix(path)}" for name, path in self.models.items())]
        self.log = self.workdir / "torchserve.log"
        # Two servers of one machine would take each other's sockets and pid file in a common temporary folder.
        places = {"TMPDIR": str(temp), "TEMP": str(temp), "JAVA_HOME": str(java.resolve().parent.parent)}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=self.workdir, env={**os.environ, **places}, start_new_session=True)  # fmt: skip

    def wait_until_ready(self, timeout_s: float) -> None:
        """``timeout_s``: without the time in which a worker compiles kernels.

        Raises:
            ServerError: it ended, or a model has not loaded in time.
        """
        patience = Patience(timeout_s)
        for name in self.models:
            while not self.inquiries.is_ready(name):
                log = self._read_log()
                if f"Load model failed: {name}," in log:
                    self._wait_for_a_cause()
                    raise ServerError(
                        f"{name} has not loaded; {self._last_words()}"
                    )  # TorchServe would retry for minutes
                if self._process.poll() is not None:
                    raise ServerError(f"TorchServe has ended; {self._last_words()}")
                if patience.is_at_its_end(log):
                    raise ServerError(f"{name} has not loaded in {timeout_s:g} s; {self._last_words()}")
                time.sleep(_POLL_S)

    def wait(self) -> int:
        """Until it ends by itself. Returns its exit status."""
        return self._process.wait()

    def drain(self, timeout_s: float) -> None:
        """Wait until our models' requests have been answered. TorchServe keeps accepting new ones; this can't be turned
        off."""
        deadline = time.monotonic() + timeout_s
        num_idle = 0  # consecutive idle looks, because metrics are a second late
        while num_idle < 2 and time.monotonic() < deadline:
            num_idle = num_idle + 1 if self.inquiries.num_open() == 0 else 0
            time.sleep(_METRICS_S)

    def stop(self, timeout_s: float = 30.0) -> None:
        """End it and its workers. May be repeated."""
        try:
            if self._process.poll() is None:
                _signal_group(self._process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout_s)
        finally:
            _signal_group(self._process.pid, signal.SIGKILL)  # what is left of it
            self._process.wait()

    def __enter__(self) -> TorchServe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _read_log(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _wait_for_a_cause(self) -> None:
        """TorchServe may write that a worker has died before it writes what the worker said."""
        deadline = time.monotonic() + _CAUSE_S
        while not causes(self._read_log()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        return "\n".join([f"its log is {self.log}:", *last_words(self._read_log())])


def serve(args: argparse.Namespace, properties: Mapping[str, str]) -> int:
    """``paged torchserve serve``: until a signal comes, or TorchServe ends."""
    addresses = Addresses(args.host, args.port, args.management_port, args.metrics_port, args.grpc_port)
    options = ServerOptions(addresses, args.token_auth, args.model_api, properties, args.java)
    workdir = args.workdir or Path(tempfile.mkdtemp(prefix="paged-torchserve-"))
    signal.signal(signal.SIGTERM, _interrupt)
    with TorchServe(args.archives, workdir, options) as server:
        try:
            print(f"TorchServe is starting; its log is {server.log}", flush=True)
            server.wait_until_ready(args.timeout)
            for name in server.models:
                print(f"ready: {addresses.url(addresses.inference)}/predictions/{name}", flush=True)
            if args.token_auth:
                print(f"keys: {server.workdir / 'key_file.json'}", flush=True)
            status = server.wait()
            print(f"TorchServe has ended by itself; its log is {server.log}", flush=True)
            return status
        except KeyboardInterrupt:
            print(f"stopping; answers under way have {args.grace:g} s to end", flush=True)
        with suppress(KeyboardInterrupt):  # a second signal
            server.drain(args.grace)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if args.workdir is None:
        shutil.rmtree(workdir, ignore_errors=True)
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _model_name(path: Path) -> tuple[str, Path]:
    """(the name in its manifest, where it is)"""
    if not path.exists():
        raise ConfigError(f"{path} doesn't exist")
    try:
        if path.is_dir():
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        else:
            with zipfile.ZipFile(path) as archive:
                check_contents(archive, path.stat().st_size, str(path))
                manifest = json.loads(read_text(archive, MANIFEST))
        name = str(manifest["model"]["modelName"])
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no TorchServe archive: {error!r}") from error
    if not _NAME.fullmatch(name):  # it becomes a file's name in the model store
        raise ConfigError(f"{path} calls its model {name!r}; letters, digits, '.', '_' and '-' make a name")
    return name, path.resolve()


def _suffix(archive: Path) -> str:
    return "" if archive.is_dir() else ".mar"


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target, target_is_directory=target.is_dir())


def _properties(options: ServerOptions) -> str:
    at = options.addresses
    lines = {
        "inference_address": f"http://{at.host}:{at.inference}",
        "management_address": f"http://{at.host}:{at.management}",
        "metrics_address": f"http://{at.host}:{at.metrics}",
        "grpc_inference_address": at.host,
        "grpc_management_address": at.host,
        "grpc_inference_port": str(at.grpc),
        "grpc_management_port": str(at.grpc + 1),
        "metrics_mode": "prometheus",
        "model_metrics_auto_detect": "true",  # else each of ours would have to be declared in a file
        **options.properties,
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)

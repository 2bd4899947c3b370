"""Helpers for tests of archives: read one, swap it, expect a refusal."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import yaml

from paged_core.cli import main

STOCK_CONFIG = """
minWorkers: 2
maxWorkers: 4
batchSize: 8
maxBatchDelay: 100
responseTimeout: 300
asyncCommunication: true
deviceType: cpu
handler:
  model_path: model
  max_new_tokens: 50
"""
WEIGHTS = bytes(range(256)) * 4000


def contents(archive: Path) -> tuple[dict[str, bytes], dict[str, Any], dict[str, Any]]:
    """Return (files, the manifest's model, the configuration) as Java unpacks the archive: from front to end."""
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        names = opened.namelist()
        assert len(names) == len(set(names))
        files = {name: opened.read(name) for name in names if not name.endswith("/")}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])["model"]
    return files, manifest, yaml.safe_load(files[manifest["configFile"]])


def swap(*args: Any) -> int:
    return main(["torchserve", "swap", *map(str, args)])


def refused(capsys: Any, *args: Any) -> str:
    assert main(["torchserve", *map(str, args)]) == 2
    return capsys.readouterr().err


def add_entry(path: Path, name: str, content: bytes = b"x", attributes: int = 0o100644) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = attributes << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, content)


def section(archive: Path) -> Any:
    return contents(archive)[2].get("paged", {})

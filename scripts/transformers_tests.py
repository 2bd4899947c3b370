"""Runs transformers' own tests twice, on stock and with ``paged_generate`` on, and tells which pass on stock only.

    python scripts/transformers_tests.py FOLDER [--no-check] PYTEST-ARGUMENTS

FOLDER holds transformers' ``tests``, of the version that is installed. The arguments say which of them to run, as in
``tests/generation tests/models/llama -k generate``. The exit code is 1 if a test passes on stock only.

The second run has this file as a pytest plugin: every model gets ``model.generate = paged_generate(model)`` when its
``generate`` is first called. Models that bring a ``generate`` of their own stay as they are. How many calls took which
tier stands at the end of its output.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_MODES = ("stock", "checked", "unchecked")
_tiers: Counter[str] = Counter()
_reasons: Counter[str] = Counter()


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        return 2
    folder, *arguments = argv
    patched = "unchecked" if "--no-check" in arguments else "checked"
    arguments = [argument for argument in arguments if argument != "--no-check"]
    with tempfile.TemporaryDirectory() as results:
        stock, ours = (_run(mode, folder, arguments, Path(results)) for mode in ("stock", patched))
    stock_only = sorted(stock - ours)
    print(f"\npassed on stock: {len(stock)}, of these with paged_generate: {len(stock & ours)}")
    for name in stock_only:
        print(f"only on stock: {name}")
    return int(bool(stock_only) or not stock)


def _run(mode: str, folder: str, arguments: list[str], results: Path) -> set[str]:
    """The names of the tests that passed."""
    report = results / f"{mode}.xml"
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-p", "transformers_tests", f"--generate={mode}", f"--junitxml={report}"]
    subprocess.run(
        command + arguments, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    )
    if not report.exists():
        return set()
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}.{case.get('name')}" for case in cases if not _trouble(case)}


def _trouble(case: ElementTree.Element) -> bool:
    return any(child.tag in ("failure", "error", "skipped") for child in case)


# ---- the pytest plugin -----------------------------------------------------------------------------------------------


class _Tally(logging.Handler):
    """Counts the reports that calls leave in the log."""

    def emit(self, record: logging.LogRecord) -> None:
        report = record.args[0] if isinstance(record.args, tuple) and record.args else None
        if hasattr(report, "tier"):
            _tiers[f"{report.tier} ({report.loop})"] += 1
            if report.reason:
                _reasons[f"{report.tier}: {report.reason}"] += 1


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--generate", choices=_MODES, default="stock")


def pytest_configure(config: Any) -> None:
    mode = config.getoption("--generate")
    if mode == "stock":
        return
    from transformers import GenerationMixin

    from paged_hf import paged_generate

    log = logging.getLogger("paged_hf")
    log.setLevel(logging.DEBUG)
    log.addHandler(_Tally())
    stock = GenerationMixin.generate

    @functools.wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "generate" in vars(self):  # it is ours, which calls the class's
            return stock(self, *args, **kwargs)
        self.generate = stock  # while the model is being checked
        self.generate = paged_generate(self, check=mode == "checked")
        return self.generate(*args, **kwargs)

    GenerationMixin.generate = generate


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for counts in (_tiers, _reasons):
        for what, count in counts.most_common():
            terminalreporter.write_line(f"{count:7} {what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

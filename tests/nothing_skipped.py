"""Hooks for conftest.py that count a skipped test as failed if PAGED_REQUIRE_ALL=1, as .ci/run sets it. Without that, a
laptop without a browser may skip the tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeVar

import pytest

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[None]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[None]:
    return _judged((yield))


def _judged(report: _Report) -> _Report:
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("PAGED_REQUIRE_ALL"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"PAGED_REQUIRE_ALL is set, and this was skipped: {reason}"
    return report

"""What .ci/run promises: with PAGED_REQUIRE_ALL=1 no skipped test counts as passed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="there is no Chromium here")
def test_marked(): pass

def test_by_hand(): pytest.skip("there is no Java here")

@pytest.mark.xfail(reason="a known bug")
def test_known(): assert False

def test_good(): pass
"""
MODULE = "import pytest\npytest.importorskip('no_such_module', reason='there is no such module')\n"


@pytest.mark.parametrize(
    ("required", "found"),
    [("", "1 passed, 3 skipped, 1 xfailed"), ("1", "1 failed, 1 passed, 1 xfailed, 2 errors")],
)
def test_what_is_skipped_has_failed_where_all_is_required(tmp_path: Path, required: str, found: str) -> None:
    (tmp_path / "conftest.py").write_text("from nothing_skipped import *\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qrA", "--continue-on-collection-errors", "-p", "no:cacheprovider", tmp_path],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={
            **os.environ, "PAGED_REQUIRE_ALL": required, "PYTHONPATH": str(Path(__file__).parent),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other people's plugins take seconds to import
        },
    )  # fmt: skip
    assert found in done.stdout, done.stdout
    for reason in ("Chromium", "Java", "such module"):
        assert reason in done.stdout
    assert (done.returncode != 0) == bool(required)


def test_the_continuous_check_requires_all() -> None:
    script = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    assert "export PAGED_REQUIRE_ALL=1\n" in script

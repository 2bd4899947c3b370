"""What the documentation shows runs: every Python block, file by file, in one namespace a file."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
FENCE = re.compile(
    r"(<!-- test: skip (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


class Block(NamedTuple):
    code: str
    line: int  # of its first line in the page
    skip: str | None  # why it can't run


def blocks_of(page: str) -> list[Block]:
    return [
        Block(match["code"], page.count("\n", 0, match.start("code")) + 1, match["reason"])
        for match in FENCE.finditer(page)
    ]


def with_python(page: Path) -> bool:
    return "```python" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if with_python(page)], ids=lambda page: page.name)
def test_every_python_block_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")  # dataclasses and pickle look for the module of a class
    monkeypatch.setitem(sys.modules, "page", module)
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(text)
    assert len(blocks) == text.count("```python"), "a block is not closed, or indented"
    for block in blocks:
        if block.skip is None:
            padded = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
            exec(compile(padded, str(page), "exec"), vars(module))


def test_hardly_any_block_is_left_out():
    skipped = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8")) if block.skip]
    assert len(skipped) <= 2


def test_links_to_files_lead_to_files():
    dead = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert dead == []

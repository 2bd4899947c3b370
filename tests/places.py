"""Paths in this repository."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def sources(folder: Path) -> list[Path]:
    """Return the Python files of a folder, at any depth."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)

"""Metrics of several processes as one page of Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable


def merged(pages: Iterable[bytes]) -> bytes:
    """The pages' samples, family by family: the format wants a family's lines together, told of once. Samples must
    differ by their labels."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family, new = "", False
        for line in page.decode().splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                new = family not in heads
                heads.setdefault(family, [])
                samples.setdefault(family, [])
            if line.startswith("#"):
                if new:
                    heads[family].append(line)
            elif line:
                samples[family].append(line)
    return "".join(f"{line}\n" for family in heads for line in (*heads[family], *samples[family])).encode()

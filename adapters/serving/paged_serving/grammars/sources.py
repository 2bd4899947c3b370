"""Which field each line of a combined grammar comes from, to name the field at fault. Knows the form of llguidance's
error messages, and no protocol.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_PLACE = re.compile(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?")
_QUOTED = re.compile(r"\n +\d+ \| ")  # where the lines of the grammar itself begin
_SCHEMA = ": %json "
_MAX_SCHEMAS = 16  # that are looked at one by one


@dataclass(frozen=True)
class Sources:
    """Of the grammar ``text``, each rule on a line of its own."""

    text: str
    fields: Mapping[int, str]  # by line, from 1; other lines are nobody's

    def blamed(self, told: str) -> tuple[str | None, str]:
        """(the field at fault, if ``told`` has a line; the error, without lines that no client has written)."""
        found = _PLACE.search(told)
        if found is None:
            return None, told
        why = _QUOTED.split(told[found.end() :])[0]
        return self.fields.get(int(found[1])), told[: found.start()] + why

    def schemas(self) -> Iterator[tuple[str, str]]:
        """(field, a grammar of one of its schemas alone), the first ones."""
        lines = self.text.split("\n")
        ours = [(field, lines[line - 1]) for line, field in sorted(self.fields.items()) if _SCHEMA in lines[line - 1]]
        for field, rule in ours[:_MAX_SCHEMAS]:
            yield field, f"start: %json {rule.partition(_SCHEMA)[2]}"

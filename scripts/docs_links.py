"""For mkdocs: links of a page that leave docs/ lead to the file in the repository."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, config: Any, **rest: Any) -> str:
    """``[text](../folder/file)`` -> the same under ``repo_url``."""
    return _OUTSIDE.sub(rf"\1{config['repo_url']}/blob/main/\2\3", markdown)

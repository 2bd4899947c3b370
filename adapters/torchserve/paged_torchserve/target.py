"""Target: the model that requests are read for."""

from __future__ import annotations

from typing import NamedTuple

from paged_serving import ServedModel
from paged_torchserve.settings import SectionSettings


class Target(NamedTuple):
    served: ServedModel
    settings: SectionSettings
    version: str = ""  # of the archive

"""An engine with the alphabet's model, and a served model over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from calls import Alphabet


@pytest.fixture(scope="module")
def alphabet() -> Iterator[Alphabet]:
    alphabet = Alphabet()
    with alphabet.engine:
        yield alphabet

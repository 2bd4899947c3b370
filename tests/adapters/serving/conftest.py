"""An engine with the alphabet's model, and a served model over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from calls import Alphabet


@pytest.fixture(scope="module")
def alphabet(request: pytest.FixtureRequest) -> Iterator[Alphabet]:
    """With the module's own ``LIMITS`` of a request and its ``TOKENIZER``, where it has them."""
    alphabet = Alphabet(getattr(request.module, "LIMITS", None), tokenizer=getattr(request.module, "TOKENIZER", None))
    with alphabet.engine:
        yield alphabet

"""Random answers in random pieces: ``python tests/many_pieces.py [TEXTS [TEMPLATE ...]]``, by default for all our
templates."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from paged_serving.response_templates.selection import known
from response_texts import WRITTEN, parser_of, read_in, told

SPECIAL = ["<|im_end|>", "<|x|>", "<tool"]  # some are markers, some begin like one


def split_differently(name: str, chance: random.Random, num: int) -> None:
    """Assert that ``num`` texts give the same when read whole and in pieces."""
    of_template = [each for each in WRITTEN if each.template == name]
    for _ in range(num):
        text = hard_text(chance, [each.text for each in of_template])
        written = chance.choice(of_template)
        silent, cut = chance.choice([(), SPECIAL]), chance.random() < 0.3
        pieces = pieces_of(chance, text)
        whole = read_in(parser_of(written, silent), [text], cut=cut)
        assert told(read_in(parser_of(written, silent), pieces, cut=cut)) == told(whole), pieces


def hard_text(chance: random.Random, texts: Sequence[str]) -> str:
    """Return parts of ``texts``, mostly of their markers, in any order."""
    bits = []
    for _ in range(chance.randrange(1, 7)):
        text = chance.choice(texts)
        start = chance.randrange(len(text))
        bits.append(text[start : start + chance.randrange(1, 60)] if chance.random() < 0.6 else text)
    return chance.choice(["", " ", "\n"]).join(bits)


def pieces_of(chance: random.Random, text: str) -> list[str]:
    places = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(0, 12)))
    if chance.random() < 0.2:
        places = list(range(1, len(text)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


if __name__ == "__main__":
    for template in sys.argv[2:] or known():
        split_differently(template, random.Random(template), int((sys.argv[1:] or ["10000"])[0]))
        print(template, "comes to the same in any pieces", flush=True)

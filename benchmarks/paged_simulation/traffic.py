"""Traffic: the arrival, prompt and output length of each request. Generated one after another, never all at once."""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from paged_core import ConfigError

_BASE = 251  # small token ids, of which Python keeps one object each


class Beginning(NamedTuple):
    """The common beginning of several prompts."""

    number: int
    tokens: list[int]


class Arrival(NamedTuple):
    """One request."""

    at_s: float
    prompt: list[int]
    num_output: int
    beginning: Beginning | None = None  # of its prompt, if others have it too


@dataclass(frozen=True)
class Traffic:
    """Requests of log-normal lengths, by default as ShareGPT's conversations have them once the very long and very
    short ones are left out; Poisson arrivals; a part of them begins with one of several shared prefixes, of which some
    are far more popular than others (Zipf's law, exponent 1)."""

    num_requests: int
    rate: float  # arrivals a second; infinity: all at once
    seed: int = 0
    prompt_median: float = 140.0  # tokens, the shared prefix left out; mean about 215
    prompt_sigma: float = 0.93
    output_median: float = 125.0  # mean about 195
    output_sigma: float = 0.94
    max_prompt: int = 1024
    max_output: int = 1024
    num_prefixes: int = 0
    prefix_tokens: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        """In order of time."""
        rng = random.Random(self.seed)
        prefixes = PopularPrefixes(self.num_prefixes, self.prefix_tokens)
        now = 0.0
        for number in range(self.num_requests):
            now += rng.expovariate(self.rate) if math.isfinite(self.rate) else 0.0
            num_prompt = _length(rng, self.prompt_median, self.prompt_sigma, self.max_prompt)
            num_output = _length(rng, self.output_median, self.output_sigma, self.max_output)
            beginning = prefixes.draw(rng)
            yield Arrival(now, _with(beginning, unique(number, num_prompt)), num_output, beginning)


@dataclass(frozen=True)
class Trace:
    """A CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, repeated until there are ``num_requests``.
    ``rate``: arrivals a second on average, stretched from the trace's own; None: as they were."""

    path: Path
    num_requests: int | None = None
    rate: float | None = None
    seed: int = 0
    num_prefixes: int = 0
    prefix_tokens: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        """In order of time.

        Raises:
            ConfigError: the file can't be read, or isn't such a trace.
        """
        rows = _rows(self.path)
        first, span = rows[0][0], rows[-1][0] - rows[0][0]
        span = span * (1 + 1 / max(1, len(rows) - 1))  # until the next round begins
        scale = 1.0 if self.rate is None or not span else len(rows) / self.rate / span
        rng, prefixes = random.Random(self.seed), PopularPrefixes(self.num_prefixes, self.prefix_tokens)
        for number in range(self.num_requests if self.num_requests is not None else len(rows)):
            rounds, i = divmod(number, len(rows))
            stamp, context, generated = rows[i]
            at_s = (stamp - first + rounds * span) * scale
            beginning = prefixes.draw(rng)
            num_own = context - len(beginning.tokens) if beginning is not None else context
            prompt = _with(beginning, unique(number, max(1, num_own)))
            yield Arrival(at_s, prompt, max(1, generated), beginning)


class PopularPrefixes:
    """Shared beginnings of prompts, drawn by popularity."""

    def __init__(self, num: int, num_tokens: int) -> None:
        spelled = (Beginning(number, _spelled(number, num_tokens, 1)) for number in range(num))
        self._prefixes = list(spelled) if num_tokens else []
        self._sums = list(accumulate(1 / (rank + 1) for rank in range(len(self._prefixes))))

    def draw(self, rng: random.Random) -> Beginning | None:
        """One of them; None if there are none."""
        if not self._prefixes:
            return None
        return self._prefixes[bisect_left(self._sums, rng.random() * self._sums[-1])]


def unique(number: int, num_tokens: int) -> list[int]:
    """Tokens that are unique to this number, if there are at least four of them."""
    return _spelled(number, num_tokens, 2)


def _with(beginning: Beginning | None, tokens: list[int]) -> list[int]:
    return tokens if beginning is None else beginning.tokens + tokens


def _spelled(number: int, num_tokens: int, kind: int) -> list[int]:
    digits = [number % _BASE, number // _BASE % _BASE, number // _BASE**2 % _BASE, kind]
    return (digits + [kind] * (num_tokens - 4))[:num_tokens]


def _length(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return min(most, max(4, round(median * math.exp(rng.gauss(0.0, sigma)))))


def _rows(path: Path) -> Sequence[tuple[float, int, int]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [
                (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no trace of TIMESTAMP, ContextTokens, GeneratedTokens: {error!r}"
        ) from None  # fmt: skip
    if not rows:
        raise ConfigError(f"{path} holds no requests")
    return sorted(rows)


def _seconds(stamp: str) -> float:
    try:
        return float(stamp)
    except ValueError:
        return datetime.fromisoformat(stamp[:26].rstrip("Z")).timestamp()

"""The workload of a comparison: prompts, lengths and arrivals, all from one seed. Knows token counts and tokenizers,
not models or systems. A length is a quantile of its distribution and never drawn at random; the seed only shuffles. So
every seed gives the same amount of work, and runs with different seeds differ only in order and text.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from statistics import NormalDist

from paged_bench.prose import ELABORATIONS, OPENINGS, TOPICS
from paged_core import ConfigError

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class BenchRequest:
    """One prompt, and how many tokens to generate for it, end-of-sequence ignored."""

    index: int
    prompt: tuple[int, ...]
    num_output: int  # tokens of each sample
    arrival_s: float = 0.0  # since the start of the run
    n: int = 1  # samples


@dataclass(frozen=True)
class Workload:
    """The requests in order of arrival, and a description."""

    description: str
    requests: tuple[BenchRequest, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output * request.n for request in self.requests)


def synthetic(encode: Encode, num_requests: int = 64, seed: int = 0) -> Workload:
    """Short English prompts of 20 to 120 tokens (mean 52), outputs of 8 to 256 (mean 109, heavy-tailed)."""
    rng = random.Random(seed)
    prompt_lens, output_lens = prompt_lengths(num_requests), output_lengths(num_requests)
    rng.shuffle(prompt_lens)
    rng.shuffle(output_lens)
    requests = tuple(
        BenchRequest(index, prose(encode, num_tokens, rng), num_output)
        for index, (num_tokens, num_output) in enumerate(zip(prompt_lens, output_lens, strict=True))
    )
    return Workload(f"built-in, seed {seed}", requests)


def from_prompts(encode: Encode, path: Path, num_requests: int | None = None, seed: int = 0) -> Workload:
    """One prompt a line; in a ``.jsonl`` each line is ``{"prompt": ..., "max_tokens": ...}``. Output lengths that the
    file doesn't say are the built-in workload's.

    Raises:
        ConfigError: the file can't be read, holds no prompt, or a line does not have the format of the file's name.
    """
    entries = [_parse_prompt(line, path) for line in _read_text(path).splitlines() if line.strip()][:num_requests]
    if not entries:
        raise ConfigError(f"{path} holds no prompts; write one a line")
    lengths = output_lengths(len(entries))
    random.Random(seed).shuffle(lengths)
    requests = tuple(
        BenchRequest(index, tuple(encode(text)), num_output or length)
        for index, ((text, num_output), length) in enumerate(zip(entries, lengths, strict=True))
    )
    return Workload(f"prompts of {path.name}", requests)


def from_trace(
    encode: Encode,
    path: Path,
    num_requests: int | None = None,
    rate: float | None = None,
    time_scale: float = 1.0,
    seed: int = 0,
) -> Workload:
    """Replay a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens: its lengths, and its arrivals
    stretched by ``time_scale``, or so that ``rate`` requests arrive a second on average. The text is made up.

    Raises:
        ConfigError: the file can't be read or isn't such a trace.
    """
    rows = _read_trace(path)[:num_requests]
    rng = random.Random(seed)
    first = rows[0][0]
    span_s = rows[-1][0] - first
    if rate is not None and span_s > 0:
        time_scale = (len(rows) / rate) / span_s
    requests = tuple(
        BenchRequest(index, prose(encode, max(1, context), rng), max(1, generated), (stamp - first) * time_scale)
        for index, (stamp, context, generated) in enumerate(rows)
    )
    note = f"arrivals of the trace times {time_scale:.4g}: {len(rows)} requests in {span_s * time_scale:.1f} s"
    return Workload(f"trace {path.name}", requests, (note,))


def with_poisson_arrivals(workload: Workload, rate: float, seed: int = 0) -> Workload:
    """The same requests, arriving one by one, ``rate`` a second on average."""
    rng = random.Random(f"arrivals {seed}")
    now, requests = 0.0, []
    for request in workload.requests:
        now += rng.expovariate(rate)
        requests.append(replace(request, arrival_s=now))
    return replace(workload, requests=tuple(requests), notes=(*workload.notes, f"Poisson arrivals, {rate:g} a second"))


def with_shared_prefix(workload: Workload, encode: Encode, num_tokens: int, seed: int = 0) -> Workload:
    """Every prompt begins with the same ``num_tokens`` tokens, as with a system prompt."""
    prefix = prose(encode, num_tokens, random.Random(f"prefix {seed}"))
    requests = tuple(replace(request, prompt=prefix + request.prompt) for request in workload.requests)
    return replace(workload, requests=requests, notes=(*workload.notes, f"{num_tokens} tokens of prefix shared by all"))


def with_samples(workload: Workload, n: int) -> Workload:
    """``n`` samples of every prompt."""
    return replace(workload, requests=tuple(replace(request, n=n) for request in workload.requests))


def fitted(workload: Workload, limit: int) -> Workload:
    """The same requests, cut so that prompt and output together have at most ``limit`` tokens; a note says how many."""
    requests = tuple(_cut(request, limit) for request in workload.requests)
    num_cut = sum(new is not old for new, old in zip(requests, workload.requests, strict=True))
    notes = (f"{num_cut} of {len(requests)} requests cut to {limit} tokens",) if num_cut else ()
    return replace(workload, requests=requests, notes=(*workload.notes, *notes))


def prompt_lengths(num: int) -> list[int]:
    """Quantiles of 20 + an exponential of mean 34, at most 120."""
    return [min(120, round(20 - 34 * math.log(1 - quantile))) for quantile in _quantiles(num)]


def output_lengths(num: int) -> list[int]:
    """Quantiles of a log-normal of median 83 (sigma 1), from 8 to 256."""
    normal = NormalDist(math.log(83), 1.0)
    return [min(256, max(8, round(math.exp(normal.inv_cdf(quantile))))) for quantile in _quantiles(num)]


def prose(encode: Encode, num_tokens: int, rng: random.Random) -> tuple[int, ...]:
    """Exactly ``num_tokens`` tokens of an English task; it may break off in the middle of a sentence."""
    text = ""
    ids: tuple[int, ...] = ()
    while len(ids) < num_tokens:
        topic = rng.choice(TOPICS)
        sentences = rng.sample(ELABORATIONS, k=len(ELABORATIONS))
        text += " ".join([rng.choice(OPENINGS).format(topic=topic), *sentences]).format(topic=topic) + "\n\n"
        longer = tuple(encode(text))
        if len(longer) <= len(ids):
            raise ConfigError("the tokenizer turns English text into no tokens; use another tokenizer")
        ids = longer
    return ids[:num_tokens]


def _quantiles(num: int) -> list[float]:
    return [(i + 0.5) / num for i in range(num)]


def _cut(request: BenchRequest, limit: int) -> BenchRequest:
    if len(request.prompt) + request.num_output <= limit:
        return request
    num_output = min(request.num_output, max(1, limit // 2))
    return replace(request, prompt=request.prompt[: limit - num_output], num_output=num_output)


def _parse_prompt(line: str, path: Path) -> tuple[str, int | None]:
    if path.suffix != ".jsonl":
        return line, None
    try:
        entry = json.loads(line)
        return str(entry["prompt"]), entry.get("max_tokens")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f'{path}: not a line of the form {{"prompt": "...", "max_tokens": 50}}: {line[:80]}'
        ) from None


def _read_trace(path: Path) -> list[tuple[float, int, int]]:
    """(seconds, context tokens, generated tokens), by time."""
    rows = []
    for number, row in enumerate(csv.DictReader(_read_text(path).splitlines()), start=2):
        try:
            stamp = _seconds(row["TIMESTAMP"])
            rows.append((stamp, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{path}, line {number}: not TIMESTAMP, ContextTokens, GeneratedTokens: {row}") from None
    if not rows:
        raise ConfigError(f"{path} holds no requests; its first line must be TIMESTAMP,ContextTokens,GeneratedTokens")
    return sorted(rows)


def _seconds(stamp: str) -> float:
    """Seconds of ``2023-11-16 18:17:03.9799600`` (any number of decimals) or of a plain number."""
    try:
        return float(stamp)
    except ValueError:
        whole, _, decimals = stamp.partition(".")
        return (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds() + float(f"0.{decimals or 0}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from None

"""The cost of prefix routing per request: reading the prompt, and choosing a replica.

    python benchmarks/bench_routing.py [smollm2] [--json PATH]

Processor time of the ingress for chats of 530 and of 4,000 tokens: new ones, ones whose system prompt (half of it) was
seen before, and the next turn of a conversation. Then that of choosing among 4 and 64 replicas for the same prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paged_core import Engine, EngineConfig
from paged_ray import CacheChanges, Placement
from paged_ray.messages import EngineFacts
from paged_ray.prompts import Prompts
from paged_ray.settings import settings

_PATH = "/v1/chat/completions"
_REPEATS = 60
_WORDS = "the quick brown fox jumps over a lazy dog while rivers run toward an old stone bridge near some quiet town"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = Engine(args.model, EngineConfig(num_blocks=600))
    prompts = Prompts(EngineFacts(engine.spec, engine.sizes, engine.config, engine.tokenizer), settings(args.model))
    found: dict[str, Any] = {}
    for num_words in (500, 3950):
        found |= _read(prompts, num_words)
    for num_replicas in (4, 64):
        found |= _choose(prompts, num_replicas)
    for name, took in found.items():
        print(f"{name}: {took:.2f} ms")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "ms": found}, indent=1) + "\n")


def _read(prompts: Prompts, num_words: int) -> dict[str, float]:
    rng = random.Random(num_words)
    system, half = _text(rng, num_words // 2), num_words // 2
    new = [_body(_text(rng, half), _text(rng, half)) for _ in range(_REPEATS)]
    shared = [_body(system, _text(rng, half)) for _ in range(_REPEATS)]
    turns = [_body(system, *(_text(rng, 40) for _ in range(num_words // 80))) for _ in range(_REPEATS)]
    for body in turns:
        _, num_tokens = prompts.digests(_PATH, body)
    later = [_next_turn(body, _text(rng, 40)) for body in turns]
    return {
        f"to read a new chat of {num_tokens} tokens": _median_ms(lambda body: prompts.digests(_PATH, body), new),
        f"half of it seen before ({num_tokens})": _median_ms(lambda body: prompts.digests(_PATH, body), shared),
        f"the next turn of one ({num_tokens})": _median_ms(lambda body: prompts.digests(_PATH, body), later),
    }


def _choose(prompts: Prompts, num_replicas: int) -> dict[str, float]:
    """Choose among replicas that have cached some of the prompts each."""
    rng, known = random.Random(num_replicas), Placement(prompts.block_size)
    known.update(range(num_replicas))
    bodies = [_body(_text(rng, 250), _text(rng, 250)) for _ in range(_REPEATS)]
    told = [prompts.digests(_PATH, body) for body in bodies]
    for digests, _ in told:
        for replica in rng.sample(range(num_replicas), 3):
            known.take_in(replica, CacheChanges(1, digests[: rng.randrange(len(digests))], []))

    def choose(number: int) -> None:
        digests, num_tokens = told[number]
        known.sent(number, known.rank(digests, num_tokens)[0], digests, num_tokens)

    return {f"to choose among {num_replicas} replicas": _median_ms(choose, range(_REPEATS))}


def _median_ms(call: Callable[[Any], object], values: Sequence[Any]) -> float:
    taken = []
    for value in values:
        began = time.process_time()
        call(value)
        taken.append(time.process_time() - began)
    return statistics.median(taken) * 1e3


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS.split(), k=num_words))


def _body(system: str, *turns: str) -> bytes:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages = [{"role": "system", "content": system}, *said]
    return json.dumps({"model": "smollm2", "messages": messages, "max_tokens": 100, "stream": True}).encode()


def _next_turn(body: bytes, text: str) -> bytes:
    told = json.loads(body)
    told["messages"] += [{"role": "assistant", "content": "Yes, of course."}, {"role": "user", "content": text}]
    return json.dumps(told).encode()


if __name__ == "__main__":
    main()

"""The effect of a long prompt on running streams: the gaps between their tokens before, during and after.

    python benchmarks/bench_stall.py [--model smollm2] [--streams 16] [--prompt-tokens 4000] [--budget N] [--json PATH]

Without chunked prefill the streams would stand still for the whole prompt; with it, a gap is bounded by the token
budget of one step.
"""

import argparse
import json
import platform
import random
import statistics
from datetime import date
from pathlib import Path

from paged_core import Engine, EngineConfig, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--budget", type=int, help="max_num_batched_tokens (default: the engine's)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    engine = Engine(args.model, EngineConfig(max_num_batched_tokens=args.budget))
    result = measure(engine, args.streams, args.prompt_tokens)
    print(
        f"{args.streams} streams, then a prompt of {args.prompt_tokens} tokens; budget {result['budget']} tokens a step"
    )
    for name, value in result.items():
        print(f"  {name:28} {value:.1f}" if isinstance(value, float) else f"  {name:28} {value}")
    if args.json:
        about = {"model": args.model, "machine": platform.processor() or platform.machine(), "date": str(date.today())}
        args.json.write_text(json.dumps(result | about, indent=2))


def measure(engine: Engine, num_streams: int, num_prompt_tokens: int) -> dict[str, float]:
    draw = random.Random(0)
    vocab = engine.spec.vocab_size
    streams = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    for i in range(num_streams):
        engine.add_request(f"stream{i}", [draw.randrange(vocab) for _ in range(60)], streams)
    for _ in range(8):
        engine.step()
    before = [_step(engine) for _ in range(20)]
    prompt = [draw.randrange(vocab) for _ in range(num_prompt_tokens)]
    engine.add_request("long", prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    during = []
    while not any(request.id == "long" for request in _news(engine, during)):
        pass
    after = [_step(engine) for _ in range(20)]
    engine.close()
    usual = statistics.median(before)
    return {
        "budget": engine.sizes.max_num_batched_tokens,
        "gap_before_ms": usual,
        "gap_during_median_ms": statistics.median(during),
        "gap_during_max_ms": max(during),
        "gap_after_ms": statistics.median(after),
        "longest_stall_in_usual_steps": max(during) / usual,
        "time_to_first_token_of_long_ms": sum(during),
        "steps_of_long": len(during),
    }


def _step(engine: Engine) -> float:
    engine.step()
    assert engine.last_stats is not None
    return engine.last_stats.duration_s * 1e3


def _news(engine: Engine, durations: list[float]) -> list:
    """Compute one step, note its duration, and return the requests that got a token."""
    outputs = engine.step()
    assert engine.last_stats is not None
    durations.append(engine.last_stats.duration_s * 1e3)
    return [output.request for output in outputs]


if __name__ == "__main__":
    main()

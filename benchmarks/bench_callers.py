"""Many threads call one model's generate: the patched one concurrently, stock's behind a lock, which it needs.

    python benchmarks/bench_callers.py [--callers 16] [--requests 64] [--stock-seconds 60] [--json PATH]

Each caller takes the next request of the built-in workload (``paged bench``'s: prompts of 52 tokens, outputs of 109 on
average), calls ``model.generate``, and takes another, until none is left. All systems generate greedily, with the
requested lengths. Behind a lock requests run one after another, whoever calls: stock answers every k-th request, as
many as it can
in the time given. Runs alternate: paged, stock, paged. Before that: the cost of patching (the first time, including
what it loads, and once more), and the time of a one-token call of a tiny model, patched and stock.
"""

import argparse
import json
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from paged_bench.report import cpu_name
from paged_bench.workloads import BenchRequest, synthetic
from paged_hf import embedded_folder, paged_generate

Answers = dict[int, list[int]]


@dataclass
class Found:
    """The results, under their names in the JSON."""

    tokens_per_s: dict[str, list[float]]  # of each system's runs
    times: float  # mean of paged, divided by stock
    same: str  # requests with the same tokens, of those that stock answered
    patch_s: list[float]  # the first time, and once more
    tiny_call_ms: dict[str, float]


def main() -> None:
    """Measure, print and write what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--stock-seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model, patch_s = _patched()
    _, again_s = _patched()
    call_ms = tiny_call_ms()
    print(f"patching: {patch_s:.2f} s, once more {again_s:.2f} s; a tiny call: {call_ms}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    requests = synthetic(tokenizer.encode, args.requests).requests
    few = requests[:: max(1, round(_stock_s(model.generate.stock, requests) / args.stock_seconds))]
    speeds, same = compare(model, requests, few, args.callers)
    times = sum(speeds["paged"]) / len(speeds["paged"]) / speeds["stock"][0]
    print(f"{args.callers} callers: {times:.1f}x of stock behind a lock; same tokens in {same} of {len(few)}")
    if args.json:
        found = Found(speeds, times, f"{same} of {len(few)}", [patch_s, again_s], call_ms)
        args.json.write_text(json.dumps({**_surroundings(args.callers), **asdict(found)}, indent=2) + "\n")


def compare(
    model: Any, requests: Sequence[BenchRequest], few: Sequence[BenchRequest], num_callers: int
) -> tuple[dict[str, list[float]], int]:
    """Output tokens per second of each run; and how many of ``few``, the requests that stock runs, have the same
    tokens."""
    stock = _locked(model.generate.stock)
    speeds: dict[str, list[float]] = {"paged": [], "stock": []}
    answers: dict[str, Answers] = {}
    for name in ("paged", "stock", "paged"):
        model.generate.release()
        generate, chosen = (model.generate, requests) if name == "paged" else (stock, few)
        answers[name], speed = run(generate, chosen, num_callers)
        speeds[name].append(speed)
        print(f"{name}: {len(chosen)} requests, {speed:.1f} output tokens/s", flush=True)
    return speeds, sum(answers["paged"][index] == tokens for index, tokens in answers["stock"].items())


def tiny_call_ms(num_calls: int = 500) -> dict[str, float]:
    """The median time of one-token calls of a model that takes almost no time itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=None, **sizes)).eval()
    patched = paged_generate(model)
    prompt = torch.arange(3, 9)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 1, "do_sample": False}
    medians = {}
    for name, generate in (("stock", patched.stock), ("paged", patched)):
        times = []
        for _ in range(num_calls):
            began = time.perf_counter()
            generate(prompt, **options)
            times.append(time.perf_counter() - began)
        medians[name] = round(1e3 * sorted(times)[num_calls // 2], 3)
    return medians


def run(generate: Callable[..., Any], requests: Sequence[BenchRequest], num_callers: int) -> tuple[Answers, float]:
    """Tokens of each request, and output tokens per second."""
    waiting, answers = list(reversed(requests)), Answers()

    def caller() -> None:
        while waiting:
            try:
                request = waiting.pop()
            except IndexError:
                return
            prompt = torch.tensor([request.prompt])  # i64 [1,L]
            output = generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.num_output)
            answers[request.index] = output[0, prompt.shape[1] :].tolist()

    threads = [threading.Thread(target=caller) for _ in range(num_callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, sum(map(len, answers.values())) / (time.perf_counter() - began)


def _patched() -> tuple[Any, float]:
    """SmolLM2 with the patched generate, and the seconds that patching took."""
    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    began = time.perf_counter()
    model.generate = paged_generate(model)
    return model, time.perf_counter() - began


def _stock_s(stock: Callable[..., Any], requests: Sequence[BenchRequest], num_tried: int = 16) -> float:
    """The estimated time of stock for all requests, one at a time, from a few tokens of the first."""
    prompt = torch.tensor([requests[0].prompt])
    stock(prompt, max_new_tokens=2)
    began = time.perf_counter()
    stock(prompt, max_new_tokens=num_tried)
    return (time.perf_counter() - began) / num_tried * sum(request.num_output for request in requests)


def _surroundings(num_callers: int) -> dict[str, Any]:
    return {
        "model": "smollm2 float32",
        "callers": num_callers,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": str(date.today()),
    }


def _locked(generate: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return generate(*args, **kwargs)

    return one_at_a_time


if __name__ == "__main__":
    main()

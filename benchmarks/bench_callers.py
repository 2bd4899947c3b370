"""Many threads call one model's generate: the patched one at once, stock's behind a lock, as its users must.

    python benchmarks/bench_callers.py [--callers 16] [--requests 64] [--stock-seconds 60] [--json PATH]

Each caller takes the next request of the built-in workload (``paged bench``'s: prompts of 52 tokens, outputs of 109 in
the mean), calls ``model.generate``, and takes another, until none is left. All systems generate what was asked for,
greedy. Behind a lock requests run one after another, whoever calls: stock answers every k-th request, as many as it can
in the time given. Runs alternate: paged, stock, paged. Before that: what patching costs (the first time, with all that
is loaded for it, and once more), and what one call of a tiny model for one token takes, patched and as stock.
"""

import argparse
import json
import platform
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from paged_bench.report import cpu_name
from paged_bench.workloads import BenchRequest, synthetic
from paged_hf import embedded_folder, paged_generate

Answers = dict[int, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--stock-seconds", type=float, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    began = time.perf_counter()
    model.generate = paged_generate(model)
    patch_s = time.perf_counter() - began
    another = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    began = time.perf_counter()
    paged_generate(another)
    again_s = time.perf_counter() - began
    call_ms = tiny_call_ms()
    print(f"patching: {patch_s:.2f} s, once more {again_s:.2f} s; a tiny call: {call_ms}", flush=True)
    requests = synthetic(tokenizer.encode, args.requests).requests
    stock = model.generate.stock
    stock(torch.tensor([requests[0].prompt]), max_new_tokens=2)
    began = time.perf_counter()
    stock(torch.tensor([requests[0].prompt]), max_new_tokens=16)
    whole_s = (time.perf_counter() - began) / 16 * sum(request.num_output for request in requests)
    few = requests[:: max(1, round(whole_s / args.stock_seconds))]

    speeds: dict[str, list[float]] = {"paged": [], "stock": []}
    answers: dict[str, Answers] = {}
    for name in ("paged", "stock", "paged"):
        model.generate.release()
        chosen = requests if name == "paged" else few
        answers[name], speed = run(model.generate if name == "paged" else _locked(stock), chosen, args.callers)
        speeds[name].append(speed)
        print(f"{name}: {len(chosen)} requests, {speed:.1f} output tokens/s", flush=True)
    same = sum(answers["paged"][index] == tokens for index, tokens in answers["stock"].items())
    times = sum(speeds["paged"]) / len(speeds["paged"]) / speeds["stock"][0]
    print(f"{args.callers} callers: {times:.1f}x of stock behind a lock; same tokens in {same} of {len(few)}")
    if args.json:
        about = {
            "model": "smollm2 float32",
            "callers": args.callers,
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": str(date.today()),
        }
        found = {
            "tokens_per_s": speeds,
            "times": times,
            "same": f"{same} of {len(few)}",
            "patch_s": [patch_s, again_s],
            "tiny_call_ms": call_ms,
        }
        args.json.write_text(json.dumps({**about, **found}, indent=2) + "\n")


def tiny_call_ms(num_calls: int = 500) -> dict[str, float]:
    """The median of calls for one token, of a model whose own time is next to nothing."""
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
    """Tokens of each request, and output tokens a second."""
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


def _locked(generate: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return generate(*args, **kwargs)

    return one_at_a_time


if __name__ == "__main__":
    main()

"""Sharing of beams and parallel samples through the patched generate: K/V blocks saved, and time compared with stock.

    python benchmarks/bench_sharing.py [--requests 8] [--widths 2,4,6] [--json PATH]

Lengths are Alpaca-like (Kwon et al., 2023, figure 11: mean prompt 19, mean output 58 tokens). "Saved" is the paper's
measure: of the blocks that would be needed without sharing, the share that sharing saved, over all steps.
The paper has 6.1-9.8 % for parallel samples and 37.6-55.2 % for beams, with blocks of 16 tokens.
"""

import argparse
import json
import platform
import random
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from paged_bench.report import cpu_name
from paged_bench.workloads import prose
from paged_hf import embedded_folder, paged_generate

_MEAN_PROMPT, _MEAN_OUTPUT = 19, 58


class Meter(StoppingCriteria):
    """A stopping criterion that counts the engine's blocks after each step and never stops."""

    def __init__(self, model: Any) -> None:
        self._host = model.generate.tiers.host
        self.used = self.shared = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stats = self._host.engine.last_stats
        self.used += stats.num_blocks_used
        self.shared += stats.num_blocks_shared
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--widths", default="2,4,6", help="numbers of beams or samples (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generate = paged_generate(model)
    requests = _requests(args.requests)
    rows = []
    for mode in ("beams", "samples"):
        for width in map(int, args.widths.split(",")):
            row = measure(model, requests, mode, width)
            rows.append(row)
            print("{mode:8} {width}: {saved:5.1%} of blocks saved; {paged_s:.1f} s, stock {stock_s:.1f} s, "
                  "{times:.2f}x; same tokens {same}".format(**row), flush=True)  # fmt: skip
    if args.json:
        about = {
            "model": "smollm2 float32",
            "requests": args.requests,
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": str(date.today()),
        }
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def measure(model: Any, requests: list[tuple[torch.Tensor, int]], mode: str, width: int) -> dict[str, Any]:
    """Run all requests one after another on both, with the same seed for each."""
    how: dict[str, Any] = (
        {"num_beams": width} if mode == "beams" else {"do_sample": True, "num_return_sequences": width}
    )
    meter = Meter(model)
    seconds, answers = {}, {}
    for name, generate in (("paged", model.generate), ("stock", model.generate.stock)):
        criteria = StoppingCriteriaList([meter] if name == "paged" else [])
        torch.manual_seed(0)
        began = time.perf_counter()
        answers[name] = [
            generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, stopping_criteria=criteria, **how)
            for ids, n in requests
        ]
        seconds[name] = time.perf_counter() - began
    same = sum(torch.equal(a, b) for a, b in zip(answers["paged"], answers["stock"], strict=True))
    return {
        "mode": mode,
        "width": width,
        "saved": meter.shared / (meter.used + meter.shared),
        "paged_s": seconds["paged"],
        "stock_s": seconds["stock"],
        "times": seconds["stock"] / seconds["paged"],
        "same": f"{same} of {len(requests)}",
    }


def _requests(num: int) -> list[tuple[torch.Tensor, int]]:
    """(prompt i64 [1,L], output tokens): both lengths exponential with Alpaca's means."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    draw = random.Random(0)
    made = []
    for _ in range(num):
        prompt = prose(tokenizer.encode, max(4, round(draw.expovariate(1 / _MEAN_PROMPT))), draw)
        made.append((torch.tensor([prompt]), max(4, round(draw.expovariate(1 / _MEAN_OUTPUT)))))
    return made


if __name__ == "__main__":
    main()

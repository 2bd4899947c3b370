"""The gain of a second rank on the same cores: one rank with all threads, two with half of them each.

    OMP_NUM_THREADS=2 python benchmarks/bench_ranks.py [MODEL] [--json PATH]

Decodes with 1 and 8 requests and reads prompts of 512 tokens, each three times in turns; tokens a second, medians. The
default model is a random Llama (8 layers, 1,024 wide, float32), saved to a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

_CASES = {"decode, 1 request": (1, 16, 48), "decode, 8 requests": (8, 16, 48), "prompts of 512": (4, 512, 1)}
_ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # internal: this process measures that many ranks
    args = parser.parse_args()
    if args.size is not None:
        print(json.dumps(_measured(args.model, args.size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or _save(Path(folder))
        seen: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(_ROUNDS):
            for size, found in seen.items():
                command = [sys.executable, __file__, model, "--size", str(size)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    _tell(seen, args.json)


def _measured(model: str, size: int) -> dict[str, float]:
    """Tokens a second of each case."""
    from paged_core import LLM, SamplingParams

    found = {}
    with closing(LLM(model, tensor_parallel_size=size, enable_prefix_caching=False, num_blocks=400)) as llm:
        for name, (num_requests, num_prompt, num_output) in _CASES.items():
            prompts: Any = [[(7 * i + j) % 900 + 10 for j in range(num_prompt)] for i in range(num_requests)]
            params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
            llm.generate(prompts, params)
            began = time.perf_counter()
            llm.generate(prompts, params)
            num_tokens = num_requests * (num_prompt if num_output == 1 else num_output)
            found[name] = num_tokens / (time.perf_counter() - began)
    return found


def _save(folder: Path) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
                         num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=1024)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _tell(seen: dict[int, list[dict[str, float]]], path: Path | None) -> None:
    medians = {size: {name: statistics.median(each[name] for each in found) for name in _CASES}
               for size, found in seen.items()}  # fmt: skip
    print("| tokens a second | 1 rank | 2 ranks |\n|---|---|---|")
    for name in _CASES:
        print(f"| {name} | {medians[1][name]:.1f} | {medians[2][name]:.1f} |")
    if path:
        path.write_text(json.dumps({"command": sys.argv, "tokens_a_second": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A script that calls ``model.generate``, with one line more: greedy, sampled and beams, each beside stock."""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_hf import embedded_folder, paged_generate

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time there was a"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="texts to continue")
    parser.add_argument("--model", help="a folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()

    name = args.model or embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name)
    inputs = tokenizer(args.prompts, return_tensors="pt", padding=True)

    model.generate = paged_generate(model)  # the one line

    ways = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        "beams": {"do_sample": False, "num_beams": 4},
    }
    for way, kwargs in ways.items():
        kwargs["max_new_tokens"] = args.max_new_tokens
        ours, seconds = timed(model.generate, inputs, kwargs)
        stock, stock_seconds = timed(model.generate.stock, inputs, kwargs)
        same = "same tokens" if torch.equal(ours, stock) else "other tokens"
        print(f"{way}: {seconds:.2f} s, stock {stock_seconds:.2f} s, {same}; {model.generate.last_report()}")
        for text in tokenizer.batch_decode(ours, skip_special_tokens=True):
            print("  ", text.replace("\n", " "))


def timed(generate, inputs, kwargs):
    torch.manual_seed(0)
    start = time.perf_counter()
    return generate(**inputs, **kwargs), time.perf_counter() - start


if __name__ == "__main__":
    main()

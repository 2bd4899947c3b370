"""vLLM's ``vllm bench serve``: both routes, with prompts of its own file format."""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from trial import MODEL, run
from vllm.benchmarks.serve import add_cli_args, main

PROMPTS = [{"prompt": f"Count to {number}."} for number in range(4)]


def bench(url: str, most: str, *options: str) -> None:
    """Without a tokenizer it would ask for one token each: ``most`` is the field that asks for eight."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(each) + "\n" for each in PROMPTS))
        parser = ArgumentParser()
        add_cli_args(parser)
        main(parser.parse_args([
            *options, "--base-url", url, "--model", MODEL, "--skip-tokenizer-init", "--dataset-name", "custom",
            "--dataset-path", str(prompts), "--num-prompts", "4", "--extra-body", json.dumps({most: 8}), "--ignore-eos",
            "--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "result.json",
        ]))  # fmt: skip
        told = json.loads((Path(folder) / "result.json").read_text())
    assert (told["completed"], told["failed"], told["total_output_tokens"]) == (4, 0, 32), told


def completions(url: str) -> None:
    bench(url, "max_tokens", "--backend", "openai")


def chats(url: str) -> None:
    bench(url, "max_completion_tokens", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions")


if __name__ == "__main__":
    run({"a benchmark of completions": completions, "of chats": chats})

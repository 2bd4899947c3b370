"""The same model behind TorchServe with a stock-style handler and with ours, with the same clients.

    python benchmarks/bench_torchserve.py [--model FOLDER] [--clients 16] [--requests 64] [--tokens 64] [--rounds 3]
                                          [--min-tokens 16] [--beside stock1 stock8] [--json PATH]

One archive is made, with the stock-style handler; it is served with batchSize 1 and 8, and swapped to ours. One
TorchServe has all three models and serves one at a time, in turns, so that a busy machine affects all alike. All decode
greedily, and none chooses an end token before --min-tokens. So "texts_equal_to_paged", the share of answers of all
rounds that equal ours, should be 1. Rates and times are medians of rounds, and "ratios" divide ours by theirs:
tokens_per_s is to be at least 4 of batches of 8 and 12 of batches
of 1, latency_p95_s below 1, and first_text_p50_s (theirs comes with the last) at most 0.1.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from transformers import AutoTokenizer

from paged_bench.prose import TOPICS
from paged_bench.report import cpu_name
from paged_torchserve import archive
from paged_torchserve.inquiries import Addresses
from paged_torchserve.java import find_java, java_version
from paged_torchserve.reading import MANIFEST
from paged_torchserve.server import ServerOptions, TorchServe

STOCK = {"stock1": 1, "stock8": 8}  # name -> batchSize
STOCK_HANDLER = Path(__file__).with_name("torchserve_stock_handler.py")


class HandlerAnswer(NamedTuple):
    text: str
    latency_s: float
    first_s: float | None  # streamed answers only


_Round = dict[str, tuple[float, list[HandlerAnswer]]]  # system -> (seconds, answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder (default: SmolLM2-135M)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of each system in each round")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--min-tokens", type=int, default=16, help="no answer ends before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", nargs="+", choices=STOCK, default=list(STOCK), help="what ours is compared with")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        rounds, tokenizer = run(args)
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    results = {name: summary([each[name] for each in rounds], tokenizer) for name in systems(args)}
    for name in results:
        pairs = [
            (ours.text, theirs.text)
            for each in rounds
            for ours, theirs in zip(each["paged"][1], each[name][1], strict=True)
        ]
        results[name]["texts_equal_to_paged"] = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    report(results, args)
    return 0


def run(args: argparse.Namespace) -> tuple[list[_Round], Any]:
    """Returns (rounds, the model's tokenizer). Everything that it starts has ended when it returns or raises."""
    model = args.model or _smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory(prefix="bench-torchserve-") as folder:
        archives = make_archives(model, Path(folder), args.beside)
        with TorchServe(archives, Path(folder) / "work", ServerOptions(_free_ports())) as server:
            server.wait_until_ready(600)
            return run_rounds(server, args), tokenizer


def systems(args: argparse.Namespace) -> tuple[str, ...]:
    return (*args.beside, "paged")


def make_archives(model: Path, folder: Path, beside: Sequence[str]) -> list[Path]:
    """Folders of archives with the stock-style handler, and the first of them swapped."""
    config = folder / "model-config.yaml"
    made = []
    for name in beside:
        config.write_text(
            f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {STOCK[name]}\nmaxBatchDelay: 50\nstartupTimeout: 600\n"
        )
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", "1.0",
                   "--handler", STOCK_HANDLER, "--extra-files", model, "--config-file", config,
                   "--export-path", folder, "--archive-format", "no-archive"]  # fmt: skip
        subprocess.run(command, check=True)
        made.append(folder / name)
    renamed = folder / "renamed"
    shutil.copytree(made[0], renamed, copy_function=os.link)
    manifest = renamed / MANIFEST
    told = json.loads(manifest.read_text())
    told["model"]["modelName"] = "paged"
    manifest.unlink()  # a link to the other's
    manifest.write_text(json.dumps(told))
    archive.swap(renamed, folder / "paged.mar", [("return_full_text", "false")])
    return [*made, folder / "paged.mar"]


def run_rounds(server: TorchServe, args: argparse.Namespace) -> list[_Round]:
    topics = [f"Explain {topic} in a few sentences." for topic in TOPICS]
    prompts = [f"{topics[index % len(topics)]} Part {index}." for index in range(args.requests)]
    for name in systems(args):  # kernels are compiled and caches filled before the clock runs
        drive(server, name, prompts[:2], args, streamed=0)
    rounds = []
    for number in range(args.rounds):
        order = systems(args)
        turn = order[number % len(order) :] + order[: number % len(order)]
        rounds.append({name: drive(server, name, prompts, args, streamed=len(prompts)) for name in turn})
    return rounds


def drive(
    server: TorchServe, name: str, prompts: list[str], args: argparse.Namespace, streamed: int
) -> tuple[float, list[HandlerAnswer]]:
    """Send all prompts with ``clients`` clients. Stock handlers don't stream: their first token comes with the last."""
    at = server.options.addresses
    url = f"{at.url(at.inference)}/predictions/{name}"
    with httpx2.Client(timeout=600, trust_env=False, limits=httpx2.Limits(max_connections=args.clients)) as client:

        def ask(prompt: str) -> HandlerAnswer:
            if name == "paged":
                return ask_paged(client, f"{url}/1.0/v1/completions", prompt, args, stream=bool(streamed))
            return ask_stock(client, url, prompt, args)

        began = time.perf_counter()
        pool = ThreadPoolExecutor(args.clients)
        try:
            answers = list(pool.map(ask, prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an interrupt, wait for no answers
        took = time.perf_counter() - began
    print(f"{name}: {len(prompts)} requests in {took:.1f} s", file=sys.stderr, flush=True)
    return took, answers


def ask_stock(client: httpx2.Client, url: str, prompt: str, args: argparse.Namespace) -> HandlerAnswer:
    began = time.perf_counter()
    body = {"prompt": prompt, "max_new_tokens": args.tokens, "min_new_tokens": args.min_tokens}
    response = client.post(url, json=body)
    assert response.status_code == 200, response.text
    return HandlerAnswer(response.text, time.perf_counter() - began, None)


def ask_paged(client: httpx2.Client, url: str, prompt: str, args: argparse.Namespace, *, stream: bool) -> HandlerAnswer:
    body = {"prompt": prompt, "max_tokens": args.tokens, "min_tokens": args.min_tokens, "temperature": 0,
            "stream": stream}  # fmt: skip
    began, first, texts = time.perf_counter(), None, []
    with client.stream("POST", url, json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            told = line.removeprefix("data: ").strip()
            if told not in ("", "[DONE]"):
                texts.append(json.loads(told)["choices"][0]["text"])
                if first is None and texts[-1]:
                    first = time.perf_counter() - began
    return HandlerAnswer("".join(texts), time.perf_counter() - began, first)


def summary(rounds: list[tuple[float, list[HandlerAnswer]]], tokenizer: Any) -> dict[str, float]:
    """The median over rounds of each number."""
    each = [of_round(seconds, answers, tokenizer) for seconds, answers in rounds]
    return {name: statistics.median(found[name] for found in each) for name in each[0]}


def of_round(seconds: float, answers: list[HandlerAnswer], tokenizer: Any) -> dict[str, float]:
    num_tokens = sum(len(tokenizer.encode(answer.text, add_special_tokens=False)) for answer in answers)
    latencies = statistics.quantiles([answer.latency_s for answer in answers], n=20)
    return {
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": num_tokens / seconds,
        "latency_p50_s": latencies[9],
        "latency_p95_s": latencies[18],
        "first_text_p50_s": statistics.median(answer.first_s or answer.latency_s for answer in answers),
    }


def ratios(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ours to each of theirs."""
    compared = ("tokens_per_s", "latency_p95_s", "first_text_p50_s")
    ours = results["paged"]
    return {name: {key: ours[key] / results[name][key] for key in compared} for name in results if name != "paged"}


def report(results: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    print("".join([f"{'':24}", *(f"{system:>10}" for system in results)]))
    for name in results["paged"]:
        print("".join([f"{name:24}", *(f"{found[name]:10.2f}" for found in results.values())]))
    for name, found in ratios(results).items():
        print(f"ours to {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    if args.json:
        packages = ("torch", "transformers", "torchserve", "paged-core")
        told = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
            "versions": {
                "python": platform.python_version(),
                "java": java_version(find_java()),
                **{name: version(name) for name in packages},
            },
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "results": results,
            "ratios": ratios(results),
        }
        args.json.write_text(json.dumps(told, indent=2) + "\n")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _smollm2() -> Path:
    from paged_hf.loading.embedded import embedded_folder

    return embedded_folder()


def _free_ports() -> Addresses:
    with ExitStack() as held:
        sockets = [held.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(4)]
        ports = [each.getsockname()[1] for each in sockets]
    return Addresses(inference=ports[0], management=ports[1], metrics=ports[2], grpc=ports[3])


if __name__ == "__main__":
    sys.exit(main())

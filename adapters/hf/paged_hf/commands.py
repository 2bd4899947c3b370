"""``paged generate``, and the options of the engine that ``paged bench`` has too. Heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import sys

from paged_core import Commands, ConfigError, SamplingParams
from paged_serving import add_engine_options, add_load_options, engine_config, quiet_imports, whole_number

_NOT_HERE = ("seed", "scheduling_policy", "enable_prefix_caching", "cuda_graphs", "gpu_memory_utilization",
             "max_num_seqs", "max_num_batched_tokens")  # fmt: skip


def register(commands: Commands) -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser(
        "generate",
        help="complete one prompt, and print the text as it is generated",
        description="Complete one prompt, and print the text as it is generated.",
    )
    add_model(parser)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the prompt's text; read from standard input if it is '-' or left out",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", default=None, help="use the model's chat template")
    form.add_argument(
        "--raw",
        action="store_false",
        dest="chat",
        help="continue the prompt without a template (default: --chat if the model has a template)",
    )
    parser.add_argument(
        "--max-tokens", type=whole_number, default=256, metavar="N", help="most tokens to generate (default: 256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most likely token")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="default: 1, all tokens; needs a temperature"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="default: 0, all tokens; needs a temperature")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling (default: random)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add_engine(parser)
    parser.set_defaults(run=generate)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a GGUF file, or smollm2")


def add_engine(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    engine = parser.add_argument_group("engine")
    add_load_options(engine, device=device)
    add_engine_options(engine, leave_out=_NOT_HERE)


def generate(args: argparse.Namespace) -> int:
    """Write the completion to standard output as it comes."""
    text = _prompt(args.prompt)
    quiet_imports()
    from paged_core import AsyncEngine, Engine

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=args.stop,
    )
    with AsyncEngine(Engine(args.model, engine_config(args), device=args.device, dtype=args.dtype)) as served:
        if served.tokenizer is None:
            raise ConfigError(f"{args.model} has no tokenizer to read text with; put its tokenizer.json beside it")
        chat = served.codec.has_chat_template if args.chat is None else args.chat
        prompt = [{"role": "user", "content": text}] if chat else text
        for delta in served.submit(prompt, params):
            print(delta.text, end="", flush=True)
            if delta.error:
                print(f"\npaged: {delta.error}", file=sys.stderr)
                return 1
    print()
    return 0


def _prompt(said: str | None) -> str:
    if said in (None, "-") and sys.stdin.isatty():
        print("paged: write the prompt, then press Ctrl-D", file=sys.stderr)
    try:
        text = sys.stdin.read() if said is None or said == "-" else said
        text.encode()  # bytes that Python decoded as lone surrogates
    except UnicodeError as error:
        raise ConfigError(f"the prompt isn't text: {error}") from error
    if not text:
        raise ConfigError("the prompt is empty; give it after the model, or on standard input")
    return text

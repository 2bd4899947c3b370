"""``paged serve`` takes a command line of vLLM's: what means the same is done, what can't be had is told."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from alphabet_model import AlphabetModel
from paged_core import ConfigError, Engine, EngineConfig
from paged_openai.commands import add_options
from paged_openai.serving import _app_options, _template, _tokenizer
from paged_openai.spellings import REASONING_PARSERS, TOOL_PARSERS, check_reasoning
from paged_serving import engine_config
from paged_serving.response_templates.selection import known


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser


def test_other_words_for_the_same(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(
        ["--kv-cache-memory-bytes", "300M", "--enforce-eager", "--no-enable-prefix-caching", "--uvicorn-log-level",
         "error", "--allowed-origins", '["http://a", "http://b"]', "--max-model-len", "64", "--enable-log-requests"]
    )  # fmt: skip
    config = engine_config(args)
    assert (config.kv_cache_bytes, config.cuda_graphs, config.enable_prefix_caching) == (300 << 20, False, False)
    assert (args.log_level, args.log_prompts, config.max_model_len) == ("error", True, 64)
    assert _app_options(args).cors_origins == ("http://a", "http://b")


def test_underscores_and_short_names_are_taken_as_vllm_has_them(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--max_model_len", "64", "-tp", "2", "--kv_cache_memory_bytes=300M", "-O3", "-pp", "1"])
    config = engine_config(args)
    assert (config.max_model_len, config.tensor_parallel_size, config.kv_cache_bytes) == (64, 2, 300 << 20)
    assert "max_model_len" not in parser.format_help(), "one spelling is enough"


def test_every_option_of_vllms_is_taken_or_told_what_to_do(parser: argparse.ArgumentParser) -> None:
    """Of those that its documentation names (2026-11); `vllm serve --help=listgroup` has them."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    names = re.findall(r"[\w-]+", (Path(__file__).parent / "vllm_options.txt").read_text(encoding="utf-8"))
    assert len(names) > 150
    assert [name for name in names if f"--{name}" not in known] == []


def test_help_shows_the_spellings_that_do_something_and_not_the_hundreds_of_others(
    parser: argparse.ArgumentParser,
) -> None:
    shown = parser.format_help()
    assert "--enforce-eager" in shown and "--tool-call-parser" in shown
    assert "--use-tqdm-on-load" not in shown and "--lora-modules" not in shown
    assert len(shown.splitlines()) < 300


def test_parsers_of_calls_are_response_templates(parser: argparse.ArgumentParser) -> None:
    given = {"openai": "gpt-oss", "llama3_json": "llama3-json", "hermes": "hermes"}
    for theirs, ours in given.items():
        assert parser.parse_args(["--tool-call-parser", theirs]).response_template == ours
    assert set(TOOL_PARSERS.values()) <= set(known())


def test_parsers_of_reasoning_must_read_what_the_template_does(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args([]).reasoning_parser is None
    assert parser.parse_args(["--reasoning-parser", "qwen3"]).reasoning_parser == "qwen3"
    for names in REASONING_PARSERS.values():
        assert all(known()[name].reasoning is not None for name in names)
    plain = known()["hermes"].only(lambda field: field.name != "reasoning_content")
    check_reasoning(None, plain)
    check_reasoning("qwen3", known()["hermes"])
    for name, template in (("mistral", known()["hermes"]), ("qwen3", plain), ("qwen3", None)):
        with pytest.raises(ConfigError, match=f"--reasoning-parser {name} isn't how .* --response-template"):
            check_reasoning(name, template)


def test_what_is_done_anyway_passes(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(
        ["--enable-auto-tool-choice", "--disable-log-requests", "--enable-chunked-prefill", "--trust-remote-code",
         "--pipeline-parallel-size", "1", "--swap-space", "4", "--load-format", "safetensors", "--async-scheduling",
         "--compilation-config", '{"mode": 3}', "--limit-mm-per-prompt", '{"image": 0}', "--model-impl", "transformers",
         "--chat-template-content-format", "auto", "--prefix-caching-hash-algo", "sha256"]
    )  # fmt: skip
    assert engine_config(args) == engine_config(parser.parse_args([]))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--pipeline-parallel-size", "2"], "2 can't be had here: there is no pipeline parallelism"),
        (["--revision", "main"], "give its folder as MODEL"),
        (["--quantization", "awq"], "models come as they were quantised"),
        (["--enable-lora"], "merge_and_unload"),
        (["--max-lora-rank", "8"], "merge_and_unload"),
        (["--default-chat-template-kwargs", "[]"], "'[]' isn't a JSON object"),
        (["--otlp-traces-endpoint", "http://x"], "set OTEL_EXPORTER_OTLP_ENDPOINT"),
        (["--data-parallel-rank", "1"], "a balancer before them"),
        (["-q", "awq"], "models come as they were quantised"),
        (["--tool-call-parser", "jamba"], "'jamba' isn't known here: there are hermes"),
        (["--reasoning-parser", "jamba"], "invalid choice: 'jamba'"),
        (["--allowed-origins", "http://a"], "isn't a JSON list"),
        (["--uvicorn-log-level", "trace"], "invalid choice"),
        (["--root-path", "/a b"], "is no path such as /llm"),
        (["--timeout-keep-alive", "0"], "isn't a whole number"),
    ],
)
def test_what_cannot_be_had_is_told_with_a_way_out(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], given: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    assert told in capsys.readouterr().err.replace("\n", " ")


class _Tokenizers:
    """Those of a plugin: one for each source."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def load_tokenizer(self, source: object) -> argparse.Namespace | None:
        self.asked.append(source)
        return argparse.Namespace(chat_template=None) if source == "other" else None


def test_a_tokenizer_and_a_template_of_ones_own(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    from paged_core import hookimpl

    hookimpl(_Tokenizers.load_tokenizer)
    tokenizers = _Tokenizers()
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}", encoding="utf-8")
    config = EngineConfig(num_blocks=16, attention_backend="reference")
    engine = Engine(AlphabetModel(), config, plugins=[tokenizers])
    try:
        tokenizer = _tokenizer(engine, parser.parse_args(["--tokenizer", "other", "--chat-template", str(file)]))
        assert (tokenizer.chat_template, tokenizers.asked) == ("{{ messages[0].content }}", ["other"])
        with pytest.raises(ConfigError, match="no tokenizer is found"):
            _tokenizer(engine, argparse.Namespace(tokenizer=b"nobody's", chat_template=None))
        with pytest.raises(ConfigError, match="needs a tokenizer"):
            _tokenizer(engine, parser.parse_args(["--chat-template", "{{ 1 }}"]))
    finally:
        engine.close()
    assert _template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(ConfigError, match="can't be read"):
        _template("nowhere.jinja")

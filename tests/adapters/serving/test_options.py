"""The engine's options are told once: in EngineConfig. Command lines, the docs and errors say the same."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from paged_core import ConfigError, EngineConfig
from paged_serving import add_engine_options, engine_config
from paged_serving.options import with_table
from places import ROOT


def parser(**options) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--seed-of-my-own", dest="seed", default=7)
    add_engine_options(made, **options)
    return made


def test_what_is_not_said_is_the_engines_default():
    assert engine_config(parser().parse_args([])) == EngineConfig()


def test_every_option_reaches_its_field():
    said = ["--block-size", "4", "--kv-bytes", "1000", "--gpu-memory-utilization", "0.5", "--kv-cache-dtype", "int8",
            "--max-num-seqs", "3", "--max-num-batched-tokens", "30", "--max-model-len", "99", "--no-prefix-caching",
            "--kv-disk", "a/folder", "--kv-disk-bytes", "20G", "--kv-host-bytes", "300m",
            "--scheduling-policy", "priority", "--attention-backend", "cpu", "--no-cuda-graphs",
            "--weights", "int4", "--seed", "-5"]  # fmt: skip
    config = engine_config(parser().parse_args(said))
    assert config == EngineConfig(
        block_size=4, kv_cache_bytes=1000, gpu_memory_utilization=0.5, kv_cache_dtype="int8", max_num_seqs=3,
        max_num_batched_tokens=30, max_model_len=99, enable_prefix_caching=False, scheduling_policy="priority",
        kv_disk_path="a/folder", kv_disk_bytes=20 << 30, kv_host_bytes=300 << 20,
        attention_backend="cpu", cuda_graphs=False, weights="int4", seed=-5,
    )  # fmt: skip
    flags = {field.metadata["option"].flag for field in fields(EngineConfig)} - {None}
    assert flags == {word for word in said if word.startswith("--")} | {"--tensor-parallel-size"}
    split = engine_config(parser().parse_args(["--tensor-parallel-size", "2"]))  # which goes without tiers
    assert split == EngineConfig(tensor_parallel_size=2)


def test_a_command_has_defaults_of_its_own_and_leaves_options_out():
    made = parser(leave_out=("seed",), defaults={"gpu_memory_utilization": 0.9})
    assert engine_config(made.parse_args([])) == EngineConfig(gpu_memory_utilization=0.9)
    assert "default: 0.9" in made.format_help()
    assert "--seed N" not in made.format_help()


@pytest.mark.parametrize(
    "said",
    [
        ["--block-size", "0"],
        ["--kv-bytes", "many"],
        ["--kv-bytes", "G"],
        ["--kv-bytes", "1.5G"],
        ["--max-num-seqs", "-1"],
    ],
)
def test_what_is_no_number_is_refused_by_the_command_line(said, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(said)
    assert said[0] in capsys.readouterr().err


def test_what_is_out_of_range_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        engine_config(parser().parse_args(["--kv-cache-dtype", "int3"]))


@pytest.mark.parametrize("page", ["serving.md", "torchserve.md"])
def test_the_docs_tables_are_todays(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text == with_table(text), f"run: python -m paged_serving.options docs/{page}"


def test_a_page_without_the_marks_is_told():
    with pytest.raises(ValueError, match="lacks the marks"):
        with_table("no table here")

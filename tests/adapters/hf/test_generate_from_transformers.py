"""What transformers' own generation tests showed: each test here failed once with the patch on, and passed on stock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from paged_hf import paged_generate
from places import ROOT


def test_a_compile_config_gets_stocks_compiled_forward(tiny: Any) -> None:
    model = tiny("llama", num_hidden_layers=1, hidden_size=32)
    model.generate = paged_generate(model, check=False)
    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True  # stock compiles on accelerators only, unless told so
    model.generate(
        torch.arange(3, 9)[None],
        max_new_tokens=3,
        cache_implementation="static",
        compile_config=compiled,
        pad_token_id=0,
    )
    report = model.generate.last_report()
    assert (report.tier, report.reason) == ("stock", "compile_config is set, and stock compiles the model")
    assert hasattr(model, "_compiled_call")


def test_state_outside_attention_is_noticed_however_little_it_matters(tiny: Any) -> None:
    """A recurrent layer of fresh weights hardly changes a logit. The model's word counts, not what can be measured."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 8, "mamba_dt_rank": 4}
    model = tiny("jamba", head_dim=None, mamba_d_state=4, **layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mamba.out_proj" in name:
                weight.mul_(1e-6)
    model.generate = paged_generate(model, check=False)
    model.generate(torch.arange(3, 9)[None], max_new_tokens=3, pad_token_id=0)
    report = model.generate.last_report()
    assert (report.tier, report.reason) == ("cache", "JambaForCausalLM keeps state outside attention")


def test_the_tool_names_what_passes_on_stock_only(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,\n"
        "                                     num_attention_heads=2, vocab_size=64)).eval()\n"
        "def test_anything():\n"
        "    assert model.generate(torch.ones(1, 3, dtype=int), max_new_tokens=2, eos_token_id=-1).shape == (1, 5)\n"
        "def test_that_nothing_is_patched():\n"
        "    assert 'generate' not in vars(model)\n"
    )
    tool = ROOT / "scripts/transformers_tests.py"
    command = [sys.executable, tool, tmp_path, "test_it.py", "--no-check"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # other people's plugins take seconds to import
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "passed on stock: 2, of these with paged_generate: 1" in done.stdout
    assert "only on stock: test_it.test_that_nothing_is_patched" in done.stdout
    assert "1 native (free)" in done.stdout

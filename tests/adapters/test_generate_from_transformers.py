"""What transformers' own generation tests showed: each test here failed once with the patch on, and passed on stock."""

from __future__ import annotations

from typing import Any

import torch
from paged_hf import paged_generate
from transformers import CompileConfig


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

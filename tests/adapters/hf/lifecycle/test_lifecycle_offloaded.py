"""A patched model whose weights accelerate keeps elsewhere."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

from paged_hf import paged_generate
from patched_calls import GREEDY, MODES, prompts


def _all_on_the_cpu(model: Any, folder: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _all_on_disk(model: Any, folder: Any) -> Any:
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def _embeddings_on_disk(model: Any, folder: Any) -> Any:
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.embed_tokens"] = "disk"
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the:UserWarning")  # stock.s own, in 5.18
@pytest.mark.parametrize("offload", [_all_on_the_cpu, _all_on_disk, _embeddings_on_disk])
@pytest.mark.parametrize("check", [False, True])
def test_models_whose_weights_are_offloaded_answer_as_before(
    make: Any, tmp_path: Any, offload: Any, check: bool
) -> None:
    model, plain = make(), make()
    offload(model, tmp_path)
    assert model.device.type == "meta"
    model.generate = paged_generate(model, check=check)
    for own in MODES.values():
        assert torch.equal(model.generate(**prompts(), **GREEDY, **own), plain.generate(**prompts(), **GREEDY, **own))
        assert model.generate.last_report().tier == "cache"

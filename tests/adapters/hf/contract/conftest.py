"""Compares ``paged_generate`` with stock in the same process: one tiny llama, every parameter of ``generate``.

Each call is made in both ways. The result, exceptions, warnings, what the caller's objects are shown, and the state of
the random numbers afterwards must be the same. The report must name the tier that the call should take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
)

from generate_parity import (
    Options,
    some_rows,
)
from paged_hf import paged_generate


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    made = tiny("llama", num_hidden_layers=2, hidden_size=32)
    made.generate = paged_generate(made, check=False)
    return made


@pytest.fixture(scope="module")
def patched(model: Any) -> Any:
    return model.generate


@pytest.fixture
def own(model: Any) -> Iterator[Any]:
    """The model, whose generation_config the test may change."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    yield model
    model.generation_config = before


@pytest.fixture(scope="module")
def rows() -> Options:
    """Four prompts of 3 to 26 tokens."""
    ids, mask = some_rows((3, 26, 13, 7))
    return {"inputs": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", *(chr(ord("!") + i) for i in range(92)), " "]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )

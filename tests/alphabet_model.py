"""A PagedModel that continues the alphabet: token i is followed by i + 1. It is for tests of everything around a
model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from paged_core.execution.spec import LayerSpec, ModelSpec

VOCAB, MAX_LEN = 97, 256  # for toy_tokenizers.CharacterTokenizer: token i is the character 32 + i; 96 is EOS


class AlphabetModel:
    """``before_forward`` is called with the token ids of each step, in the thread that steps."""

    def __init__(self, before_forward: Callable[[list[int]], object] | None = None, vocab_size: int = VOCAB) -> None:
        layer = LayerSpec(1, 1, 16, 16, 0.25, torch.device("cpu"))
        self.spec = ModelSpec(
            (layer,), vocab_size, MAX_LEN, torch.float32, torch.device("cpu"), (vocab_size - 1,), "alphabet"
        )
        self.before_forward = before_forward or (lambda token_ids: None)

    def forward(self, token_ids, positions, attend, sample_indices):
        self.before_forward(token_ids.tolist())
        heads = torch.zeros(len(token_ids), 1, 16)
        attend(0, heads, heads, heads)
        following = (token_ids[sample_indices] + 1) % self.spec.vocab_size
        return torch.nn.functional.one_hot(following, self.spec.vocab_size) * 50.0


class Gate:
    """Lets steps run only while it is open. Use it as ``before_forward`` of a model whose steps a test holds."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.num_steps = 0
        self.shuts_at: int | None = None  # it shuts itself before this step

    def __call__(self, token_ids: list[int]) -> None:
        if self.num_steps + 1 == self.shuts_at:
            self.shut()
        self.num_steps += 1  # a test that waits for this step then finds the gate shut
        assert self._open.wait(30), "the test never opened the gate"

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()

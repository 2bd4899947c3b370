"""A causal language model in a few lines of torch: no framework, and none of the code under test.

It runs on the engine as a PagedModel, and alone (``generate``) with dense attention, to compare with.
"""

import torch

from paged_core.execution.fingerprint import fingerprint
from paged_core.execution.spec import LayerSpec, ModelSpec

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, MAX_LEN = 4, 2, 16, 2, 97, 512
EOS = 96


class TinyModel:
    def __init__(self, seed: int = 0, window: int | None = None) -> None:
        g = torch.Generator().manual_seed(seed)
        hidden, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        self.embed = torch.randn(VOCAB, hidden, generator=g)
        self.place = torch.randn(MAX_LEN, hidden, generator=g)
        self.qkv = [torch.randn(hidden, hidden + 2 * kv, generator=g) / hidden**0.5 for _ in range(LAYERS)]
        # not tied to the embeddings, or it would repeat its last token
        self.unembed = torch.randn(VOCAB, hidden, generator=g) / 4
        self.out = [torch.randn(hidden, hidden, generator=g) / hidden**0.5 for _ in range(LAYERS)]
        layer = LayerSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5, torch.device("cpu"), window)
        self.spec = ModelSpec((layer,) * LAYERS, VOCAB, MAX_LEN, torch.float32, torch.device("cpu"), (EOS,), "tiny")

    def fingerprint(self) -> str:
        return fingerprint([self.embed, self.place, self.unembed, *self.qkv, *self.out])

    def forward(self, token_ids, positions, attend, sample_indices):
        x = self.embed[token_ids] + self.place[positions]  # [T, hidden]
        for i in range(LAYERS):
            q, k, v = (x @ self.qkv[i]).split((HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM), dim=-1)
            heads = (t.view(len(x), -1, HEAD_DIM) for t in (q, k, v))
            x = x + 2 * torch.tanh(attend(i, *heads).reshape(len(x), -1) @ self.out[i])
        return x[sample_indices] @ self.unembed.T

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Return greedy tokens, computing everything anew for each token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            last = torch.tensor([len(tokens) - 1])
            logits = self.forward(torch.tensor(tokens), torch.arange(len(tokens)), self.dense, last)
            tokens.append(int(logits[0].argmax()))
        return tokens[len(prompt) :]

    def dense(self, layer, q, k, v, sinks=None):
        window = self.spec.layers[layer].sliding_window
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
        hidden = (distance < 0) | (distance >= (window or MAX_LEN))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


class ChangingModel(TinyModel):
    """A model whose user says by ``changed`` that the weights have changed."""

    changed = False

    def accelerate(self, create):
        return 0

    def refresh(self):
        changed, self.changed = self.changed, False
        return changed

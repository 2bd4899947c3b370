"""A tiny Llama with a byte tokenizer, saved as a folder that any Hugging Face loader can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def byte_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: token for token, letter in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", chat_template=CHAT)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Return a random model, with weights so large that greedy tokens vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.05 if "embed" in name else 1.7 * weight.shape[-1] ** -0.5)
        model.lm_head.weight[0] = 0  # so that the end-of-sequence token never comes
        model.lm_head.weight[128 + 1 :] = 0  # so that most tokens are ASCII
    model.generation_config.eos_token_id = None
    return model


def save(folder: Path, seed: int = 0) -> Path:
    tiny_model(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder

"""The handler that bench_torchserve.py compares with: what TorchServe's examples for text generation do. It pads a
batch to its longest prompt and calls ``generate`` once for all of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class StockHandler:
    """One ``generate`` call for each batch that TorchServe has collected."""

    def initialize(self, context: Any) -> None:
        folder = Path(context.system_properties["model_dir"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        named = self.model.generation_config.eos_token_id
        named = named if isinstance(named, list) else [named]
        # A served answer also ends at the tokenizer's end token, so that all systems end alike.
        self.ends = sorted({*named, self.tokenizer.eos_token_id} - {None})

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        bodies = [each["body"] for each in data]
        batch = self.tokenizer([body["prompt"] for body in bodies], return_tensors="pt", padding=True)
        most = max(body["max_new_tokens"] for body in bodies)
        least = min(body["min_new_tokens"] for body in bodies)
        with torch.inference_mode():
            rows = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=least,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.ends or None,
            )
        return self.tokenizer.batch_decode(rows[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

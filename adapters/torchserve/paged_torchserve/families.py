"""The handlers of pytorch/serve's own text-generation examples: their requests and answers. A handler is recognised by
names in its source. Source: the ``examples`` of pytorch/serve 0.12.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SAMPLED: Mapping[str, Any] = {"do_sample": True, "top_p": 0.95, "top_k": 60}


@dataclass(frozen=True)
class Family:
    name: str  # the folder under examples/
    marks: Sequence[str]  # all of them stand in the handler's source
    reply: str = "text"  # settings.reply
    full_text: bool = True  # whether the prompt was part of the answer
    streamed: bool = False  # whether clients got plain text in pieces without asking for it
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of generation, as its code had them
    length: str = "max_new_tokens"  # which of the old configuration's keys limits an answer
    meaning: str = "max_new_tokens"  # of that key: "max_length" counts the prompt too


# The first match counts, so special ones come first.
FAMILIES: Sequence[Family] = (
    Family("large_models/vllm", ("vllm_handler",), full_text=False),  # TorchServe's own, by name
    Family("large_models/vllm", ("AsyncLLMEngine",), full_text=False),
    Family("large_models/tp_llama", ("from llama2 import", "stopping_criteria"), "json", False),
    Family("large_models/inferentia2 (continuous batching)", ("neuronx", "stopping_criteria"), "json", False),
    Family("large_models/trt_llm", ("class TRTLLMHandler",), "json", False),
    Family("large_models/deepspeed_mii", ("class DeepSpeedMIIHandler", "max_new_tokens"), full_text=False),
    Family("large_models/gpt_fast", ("class GptHandler",), full_text=False, streamed=True),
    Family("large_models/mixtral_moe", ("TextIteratorStreamerBatch",), streamed=True),
    Family("large_models/deepspeed", ("get_ds_engine", "batch_decode"), "list",
        length="max_length", meaning="max_length"),
    Family("large_models/Huggingface_accelerate/llama", ("class LlamaHandler", "batch_decode"), meaning="max_length"),
    Family("large_models/Huggingface_peft", ("class PEFT_Handler",), meaning="max_length"),
    Family("large_models/ipex_llm_int8", ("class IpexLLMHandler",)),
    Family("large_models/Huggingface_accelerate", ("BloomForCausalLM", "setup_config"),
        defaults=_SAMPLED, length="max_length"),
    Family("Huggingface_Transformers", ("text_generation", "setup_config"),
        defaults={**_SAMPLED, "max_length": 50}, length="", meaning="max_length"),
)  # fmt: skip


def family_of(source: str) -> Family | None:
    """The family of a handler with that source; None: it is none of the examples'."""
    return next((family for family in FAMILIES if all(mark in source for mark in family.marks)), None)

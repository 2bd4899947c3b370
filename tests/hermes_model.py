"""A model that generates a given text, with a byte tokenizer whose chat template supports tools and reasoning."""

from __future__ import annotations

from typing import Any

import torch

from paged_core.execution.spec import LayerSpec, ModelSpec
from tiny_folder import byte_tokenizer

MAX_LEN, VOCAB, EOS = 4096, 257, 0
CHAT = """{%- if tools %}<|im_start|>system
Call tools so: <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def hermes_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


class SayingModel:
    """Generates the text that it is given, for one request at a time. If a token is forbidden, the lowest allowed id
    comes instead. Its logits are so sharp that sampling changes nothing."""

    def __init__(self) -> None:
        layer = LayerSpec(1, 1, 16, 16, 0.25, torch.device("cpu"))
        self.spec = ModelSpec((layer,), VOCAB, MAX_LEN, torch.float32, torch.device("cpu"), (EOS,), "saying")
        self._tokens: list[int] = []
        self._start = self._last = 0  # positions

    def say(self, text: str) -> None:
        self._tokens = [*byte_tokenizer().encode(text, add_special_tokens=False), EOS]

    def forward(self, token_ids, positions, attend, sample_indices):
        heads = torch.zeros(len(token_ids), 1, 16)
        attend(0, heads, heads, heads)
        place = int(positions[-1])
        if len(token_ids) > 1 or place != self._last + 1:
            self._start = place
        self._last = place
        logits = 20.0 * torch.arange(VOCAB, 0, -1).repeat(len(sample_indices), 1)
        said = place - self._start
        logits[:, self._tokens[said] if said < len(self._tokens) else EOS] = 20.0 * (VOCAB + 1)
        return logits

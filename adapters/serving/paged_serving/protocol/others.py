"""Fields of other servers that would change an answer, but are not supported here: refused by name. An unknown field is
ignored and reported; one whose meaning is known must not be ignored. They are fields of vLLM, SGLang, llama.cpp, TGI,
OpenRouter and ``generate``.
"""

from __future__ import annotations

from typing import Annotated, Any

from paged_serving.protocol.bodies import Ignored, only
from paged_serving.protocol.structured import OpenAIStructures

_STRUCTURE = "isn't this server's name for it; use structured_outputs or response_format"
_LENGTH = "isn't this server's name for it; use max_tokens"
_SAMPLING = "can't be honoured: this server doesn't sample so"


class OthersFields(OpenAIStructures, frozen=True, kw_only=True):
    """Each is accepted with a value that asks for nothing."""

    max_new_tokens: Annotated[Any, only(why=_LENGTH)] = None
    n_predict: Annotated[Any, only(-1, why=_LENGTH)] = None
    min_new_tokens: Annotated[Any, only(0, why="isn't this server's name for it; use min_tokens")] = None
    regex: Annotated[Any, only(why=_STRUCTURE)] = None
    ebnf: Annotated[Any, only(why=_STRUCTURE)] = None
    grammar: Annotated[Any, only("", why=_STRUCTURE)] = None
    json_schema: Annotated[Any, only({}, why=_STRUCTURE)] = None
    structural_tag: Annotated[Any, only(why=_STRUCTURE)] = None

    typical_p: Annotated[Any, only(1, 1.0, why=_SAMPLING)] = None
    top_a: Annotated[Any, only(0, 0.0, why=_SAMPLING)] = None
    tfs_z: Annotated[Any, only(1, 1.0, why=_SAMPLING)] = None
    mirostat: Annotated[Any, only(0, why=_SAMPLING)] = None
    xtc_probability: Annotated[Any, only(0, 0.0, why=_SAMPLING)] = None
    dry_multiplier: Annotated[Any, only(0, 0.0, why=_SAMPLING)] = None
    dynatemp_range: Annotated[Any, only(0, 0.0, why=_SAMPLING)] = None
    no_repeat_ngram_size: Annotated[Any, only(0, why=_SAMPLING)] = None
    num_beams: Annotated[Any, only(1, why="isn't this server's name for it; use use_beam_search and n")] = None
    repetition_detection: Annotated[Any, only(why="can't be honoured: this server looks for no repetitions")] = None
    logits_processors: Annotated[Any, only([], why="can't be set by a request: they are programs")] = None
    custom_logit_processor: Annotated[Any, only(why="can't be set by a request: it is a program")] = None
    vllm_xargs: Annotated[Any, only({}, why="is for plugins of vLLM; this server has none of them")] = None

    echo: Annotated[Any, only(False, why="can't be honoured in a chat; use completions")] = None
    documents: Annotated[Any, only([], why="can't be honoured; put them into the prompt")] = None
    prompt_embeds: Annotated[Any, only([], why="can't be honoured: this server reads text and token ids")] = None
    lora_path: Annotated[Any, only("", why="can't be honoured: this server has no adapters")] = None
    adapter_id: Annotated[Any, only("", why="can't be honoured: this server has no adapters")] = None
    kv_transfer_params: Annotated[Any, only({}, why="can't be honoured: K/V are handed to no other server")] = None

    request_id: Ignored = None  # the header X-Request-Id says it

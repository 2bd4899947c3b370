"""Text in and out, as a user sees it: nothing lost, nothing shown twice, no half characters, no stop strings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_core.errors import InvalidRequestError
from paged_core.scheduling.params import SamplingParams
from paged_core.text.codec import Prompt, TextCodec, prepare_params
from paged_core.text.prompts import encode_prompt
from paged_core.text.stop_strings import StopStringChecker, StopStrings
from toy_tokenizers import REPLACEMENT, ByteTokenizer, SentencePieceTokenizer

BYTES = ByteTokenizer()
SENTENCES = SentencePieceTokenizer()
BYTE_CODEC = TextCodec(BYTES)
SENTENCE_CODEC = TextCodec(SENTENCES)

byte_ids = st.lists(st.integers(0, BYTES.size + 3), max_size=60)  # some beyond the vocabulary
awkward_bytes = st.lists(
    st.sampled_from([*range(256, BYTES.size), 0x80, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0xC3, 0xA9, 0x20, 0x61, 0xFF]),
    max_size=150,
)
whole_characters = st.one_of(
    st.integers(SENTENCES.first_word, len(SENTENCES.pieces) + 2).map(lambda token: [token]),
    st.sampled_from([[0], [1]]),
    st.sampled_from(["é", "€", "😀", "\n", "a", " "]).map(SENTENCES.byte_ids),
)
byte_characters = st.sampled_from(["é", "€", "😀", " "]).map(SENTENCES.byte_ids)
sentence_ids = st.one_of(st.lists(whole_characters, max_size=60), st.lists(byte_characters, max_size=40)).map(
    lambda parts: [token for part in parts for token in part]
)


def stream(codec: TextCodec, ids: list[int], skip: bool, chunk: int = 1) -> list[str]:
    detokenizer = codec.detokenizer(skip)
    deltas = [detokenizer.push(ids[start : start + chunk]) for start in range(0, len(ids), chunk)]
    return [*deltas, detokenizer.flush()]


@settings(max_examples=150)
@given(ids=st.one_of(byte_ids, awkward_bytes), skip=st.booleans(), chunk=st.integers(1, 5))
def test_streamed_bytes_make_the_text_of_all_ids(ids: list[int], skip: bool, chunk: int) -> None:
    assert "".join(stream(BYTE_CODEC, ids, skip, chunk)) == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150)
@given(ids=st.one_of(byte_ids, awkward_bytes))
def test_at_most_one_unfinished_character_is_held_back_and_none_is_shown(ids: list[int]) -> None:
    detokenizer = BYTE_CODEC.detokenizer(True)
    ids = [token for token in ids if token < BYTES.eos_token_id]
    shown = ""
    for end, token in enumerate(ids, start=1):
        shown += detokenizer.push([token])
        so_far = BYTES.decode(ids[:end], skip_special_tokens=True)
        assert so_far.startswith(shown)
        held = so_far[len(shown) :]
        assert not held.strip(REPLACEMENT)
        assert len(held) <= 3 or held in BYTES.decode(ids[max(0, end - 3) : end])  # three tokens of garbage, or less


@settings(max_examples=150)
@given(ids=sentence_ids, skip=st.booleans(), chunk=st.integers(1, 5))
def test_streamed_sentence_pieces_make_the_text_of_all_ids(ids: list[int], skip: bool, chunk: int) -> None:
    assert "".join(stream(SENTENCE_CODEC, ids, skip, chunk)) == SENTENCES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, len(SENTENCES.pieces)), max_size=120))
def test_where_bytes_are_malformed_no_character_is_lost(ids: list[int]) -> None:
    streamed = iter("".join(stream(SENTENCE_CODEC, ids, True)))
    wanted = SENTENCES.decode(ids, skip_special_tokens=True).replace(REPLACEMENT, "")
    assert all(character in streamed for character in wanted)  # in this order


def test_a_character_of_several_byte_tokens_appears_whole_and_at_once() -> None:
    ids = [*SENTENCES.byte_ids("é😀"), SENTENCES.first_word + 1, *SENTENCES.byte_ids("\n")]
    assert stream(SENTENCE_CODEC, ids, True) == ["", "é", "", "", "", "😀", " Hello", "\n", ""]


@pytest.mark.parametrize("before", range(9))
def test_long_runs_of_byte_tokens_stream_whole_wherever_the_window_is_cut(before: int) -> None:
    ids = [SENTENCES.first_word + 1] * before + SENTENCES.byte_ids("😀 é€" * 20)
    assert "".join(stream(SENTENCE_CODEC, ids, True)) == SENTENCES.decode(ids)


def test_only_a_texts_own_first_space_is_dropped() -> None:
    hello = SENTENCES.first_word + 1
    assert stream(SENTENCE_CODEC, [hello, hello], True)[:2] == ["Hello", " Hello"]
    assert stream(SENTENCE_CODEC, [0, hello, 1, hello], True)[:4] == ["", "Hello", "", " Hello"]
    assert "".join(stream(SENTENCE_CODEC, [0, hello, 1, hello], False)) == "<s> Hello</s> Hello"


def test_a_replacement_character_the_model_wrote_is_shown_soon_and_kept() -> None:
    real = [*BYTES.encode("x"), 256 + BYTES.LONGER.index(REPLACEMENT)]
    assert "".join(stream(BYTE_CODEC, real, True)) == "x" + REPLACEMENT
    assert "".join(stream(BYTE_CODEC, real + BYTES.encode("y"), True)[:-1]) == "x" + REPLACEMENT + "y"
    endless = stream(BYTE_CODEC, real[1:] * 500, True)
    assert len("".join(endless[:-1])) == 497


@pytest.mark.parametrize("garbage", [[0x80], [0xFF], [0xE2, 0x82], [256 + 6], [BYTES.eos_token_id], [BYTES.size + 1]])
def test_the_work_for_a_token_does_not_grow_with_the_text(garbage: list[int]) -> None:
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
            Counting.longest = max(Counting.longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    stream(TextCodec(Counting()), garbage * 1000, True)
    assert Counting.longest <= 64


def test_valid_bytes_after_a_broken_run_do_not_make_the_window_grow() -> None:
    ids = [2 + 0xFF, *SENTENCES.byte_ids("é") * 200]
    assert len("".join(stream(SENTENCE_CODEC, ids, True)[:-1])) >= 190


# ---- stop strings ------------------------------------------------------------------------------------------------

few_letters = st.text("abc", max_size=30)
stop_sets = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first match ends, and which string it is: written down as the words say it."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@settings(max_examples=250)
@given(text=few_letters, stops=stop_sets, cuts=st.lists(st.integers(0, 30)), include=st.booleans())
def test_streamed_text_with_stop_strings_is_the_text_cut_at_once(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    checker = StopStringChecker(StopStrings(stops), include)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    shown = "".join(checker.push(text[a:b]) for a, b in pairwise(edges)) + checker.flush()
    match = first_match(text, stops)
    if match is None:
        assert (shown, checker.matched) == (text, None)
    else:
        end, stop = match
        assert checker.matched == stop
        assert shown == text[: end if include else end - len(stop)]


@settings(max_examples=200)
@given(text=few_letters, stops=stop_sets)
def test_no_beginning_of_a_stop_string_is_shown_and_nothing_else_is_held(text: str, stops: list[str]) -> None:
    checker = StopStringChecker(StopStrings(stops))
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += checker.push(character)
        if checker.matched is not None:
            break
        so_far = text[:end]
        held = max(
            (size for size in range(end + 1) if any(stop.startswith(so_far[end - size :]) for stop in stops)), default=0
        )
        assert shown == so_far[: end - held]


def test_a_very_long_stop_string_costs_no_more_for_each_character() -> None:
    checker = StopStringChecker(StopStrings(["a" * 50_000 + "b"]))
    shown = sum(len(checker.push("a" * 1000)) for _ in range(200))
    assert shown == 150_000
    assert checker.push("b") == "a" * 0 + checker.flush()
    assert checker.matched is not None


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_may_be_text_ids_arrays_or_chat_messages() -> None:
    assert encode_prompt(BYTE_CODEC, "hi") == ("hi", [104, 105])
    assert encode_prompt(BYTE_CODEC, (1, 2)) == (None, [1, 2])
    assert encode_prompt(BYTE_CODEC, np.array([3, 4])) == (None, [3, 4])
    assert encode_prompt(BYTE_CODEC, [np.int64(3)]) == (None, [3])
    chat = encode_prompt(BYTE_CODEC, [{"role": "user", "content": "hi"}])
    assert chat.text == "user: hi\nassistant:"
    assert bytes(chat.token_ids).decode() == chat.text


def test_a_single_token_stands_for_its_bytes_inside_a_text() -> None:
    codec = TextCodec(SentencePieceTokenizer())
    assert [codec.token_bytes(token) for token in (258, 259, 261, 267)] == [b" ", b" Hello", b"ing", b""]
    assert [codec.token_bytes(2 + byte) for byte in (65, 0xC2, 0xFF)] == [b"A", b"\xc2", b"\xff"], "bytes by themselves"
    assert codec.token_bytes(263) == "\ufffd".encode()
    assert TextCodec(None).token_bytes(5) == b""


def test_a_prompt_that_was_encoded_before_is_taken_as_it_is() -> None:
    codec = TextCodec(SentencePieceTokenizer())
    assert encode_prompt(codec, Prompt("x", [5, 6])) == Prompt("x", [5, 6])
    with pytest.raises(InvalidRequestError, match="empty"):
        encode_prompt(codec, Prompt("", []))


def test_special_tokens_are_added_to_text_but_not_to_a_rendered_chat() -> None:
    class WithChat(SentencePieceTokenizer):
        apply_chat_template = ByteTokenizer.apply_chat_template

    codec = TextCodec(WithChat())
    assert encode_prompt(codec, "a").token_ids[0] == 0
    assert encode_prompt(codec, [{"role": "user", "content": "a"}]).token_ids[0] != 0


@pytest.mark.parametrize(
    ("codec", "prompt", "told"),
    [
        (TextCodec(None), "hi", "no tokenizer"),
        (TextCodec(None), [{"role": "user", "content": "hi"}], "chat template"),
        (SENTENCE_CODEC, [{"role": "user", "content": "hi"}], "chat template"),
        (BYTE_CODEC, [{"content": "hi"}], "'role'"),
        (BYTE_CODEC, [{"role": "assistant", "content": "hi"}], "the user speaks first"),
        (BYTE_CODEC, "", "empty"),
        (BYTE_CODEC, [], "empty"),
        (BYTE_CODEC, [1, "a"], "neither"),
        (BYTE_CODEC, [1.5], "neither"),
        (BYTE_CODEC, [True], "neither"),
        (BYTE_CODEC, b"hi", "bytes"),
        (BYTE_CODEC, None, "NoneType"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_the_reason(codec: TextCodec, prompt: object, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        encode_prompt(codec, prompt)


def test_bad_words_become_token_ids_with_and_without_a_leading_space() -> None:
    params = prepare_params(BYTE_CODEC, SamplingParams(bad_words=["no", "no"], bad_words_token_ids=[[7]]))
    assert params.bad_words_token_ids == ((7,), tuple(b"no"), tuple(b" no"))
    assert not params.bad_words


@pytest.mark.parametrize("params", [SamplingParams(stop="x"), SamplingParams(bad_words=["x"])])
def test_stop_strings_and_bad_words_need_a_tokenizer(params: SamplingParams) -> None:
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        prepare_params(TextCodec(None), params)


def test_without_a_tokenizer_there_is_no_text_but_nothing_breaks() -> None:
    assert stream(TextCodec(None), [1, 2], True) == ["", "", ""]


def test_a_tokenizer_that_cannot_be_copied_is_never_entered_by_two_threads() -> None:
    class Fragile(ByteTokenizer):
        inside = 0

        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("no copies")

        def _enter(self, work: Callable[[], object]) -> object:
            Fragile.inside += 1
            assert Fragile.inside == 1
            result = work()
            Fragile.inside -= 1
            return result

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return self._enter(lambda: ByteTokenizer.encode(self, text))

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
            return self._enter(lambda: ByteTokenizer.decode(self, token_ids))

    codec = TextCodec(Fragile())
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                assert codec.decode(codec.encode("hello" * 20)) == "hello" * 20
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures and not any(thread.is_alive() for thread in threads)

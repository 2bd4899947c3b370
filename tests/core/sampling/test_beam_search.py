"""Beam search in the engine: the sequences of a plain dense search, whatever runs beside them, however tight it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alphabet_model import AlphabetModel
from calls import Alphabet
from paged_core import LLM, AsyncEngine, Engine, EngineConfig, InvalidRequestError, SamplingParams, hookimpl
from paged_serving import ChatCall, CompletionCall
from tiny_model import EOS, VOCAB, TinyModel
from toy_tokenizers import CharacterTokenizer

PROMPT = [8, 6, 7, 5, 3, 0, 9]
ROOMY = {"num_blocks": 400, "max_num_batched_tokens": 256}
CHUNKED = {"num_blocks": 400, "max_num_batched_tokens": 8}
TIGHT = {"num_blocks": 30, "max_num_batched_tokens": 16}  # preempts


def talkative_model(seed: int = 0) -> TinyModel:
    """A model that often, not always, may end."""
    model = TinyModel(seed)
    model.unembed[EOS] *= 1.3
    return model


def small(**config: Any) -> EngineConfig:
    sizes = {"block_size": 4, "max_num_seqs": 8, "attention_backend": "reference", **ROOMY, **config}
    return EngineConfig(**sizes)


def beams(width: int, max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(n=width, max_tokens=max_tokens, use_beam_search=True, **more)


def plain_search(
    model: TinyModel, prompt: list[int], width: int, num_tokens: int, penalty: float, stops: set[int], early: bool
) -> list[tuple[list[int], float]]:
    """(tokens, sum of log-probabilities) of the best, by computing everything for each beam and going to the end."""
    running: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[float, list[int], float]] = []
    for step in range(num_tokens):
        candidates = []
        for tokens, total in running:
            ids = torch.tensor(prompt + tokens)
            logits = model.forward(ids, torch.arange(len(ids)), model.dense, torch.tensor([len(ids) - 1]))
            values, tops = logits[0].log_softmax(-1).topk(min((1 + max(1, len(stops))) * width, VOCAB))
            for value, token in zip(values.tolist(), tops.tolist(), strict=True):
                if token in stops:
                    ended.append(((total + value) / len(ids) ** penalty, [*tokens, token], total + value))
                else:
                    candidates.append(([*tokens, token], total + value))
        running = sorted(candidates, key=lambda beam: -beam[1])[:width]
        if early and len(ended) >= width and step < num_tokens - 1:
            running = []
            break
    ended += [(total / (len(prompt) + len(tokens)) ** penalty, tokens, total) for tokens, total in running]
    return [(tokens, total) for _, tokens, total in sorted(ended, key=lambda beam: -beam[0])[:width]]


def check_rows(outputs: Any, truth: list[tuple[list[int], float]]) -> None:
    assert [list(output.token_ids) for output in outputs] == [tokens for tokens, _ in truth]
    assert [output.cumulative_logprob for output in outputs] == pytest.approx([total for _, total in truth], abs=1e-3)


@pytest.mark.parametrize("config", [ROOMY, CHUNKED, TIGHT], ids=["roomy", "chunked", "tight"])
@pytest.mark.parametrize("width", [1, 4])
def test_the_best_beams_are_those_of_a_plain_search_among_other_requests(config: Any, width: int) -> None:
    model = talkative_model()
    llm = LLM(model, tokenizer=CharacterTokenizer(), config=small(**config))
    busy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [[i] * 18 for i in range(4)]
    *others, found = llm.generate([*prompts, PROMPT], [busy] * 4 + [beams(width, 14)])
    truth = plain_search(model, PROMPT, width, 14, 1.0, {EOS}, False)
    check_rows(found.outputs, truth)
    assert [output.token_ids for each in others for output in each.outputs] == [model.generate(p, 20) for p in prompts]
    assert llm.engine.memory.num_blocks_used == 0
    if config is TIGHT and width > 1:
        assert llm.engine.last_stats.total_preemptions > 0
    llm.close()


@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("early", [False, True], ids=["exhaustive", "early"])
@pytest.mark.parametrize("more", [{}, {"ignore_eos": True}, {"stop_token_ids": [11, 30, 71]}], ids=str)
def test_ends_and_scores_are_those_of_the_rules(penalty: float, early: bool, more: dict[str, Any]) -> None:
    model = talkative_model(1)
    stops = {*more.get("stop_token_ids", ()), *(() if "ignore_eos" in more else (EOS,))}
    llm = LLM(model, tokenizer=CharacterTokenizer(), config=small())
    for prompt in (PROMPT, [40, 41], [3] * 9):
        params = beams(3, 10, length_penalty=penalty, early_stopping=early, **more)
        (found,) = llm.generate([prompt], params)
        truth = plain_search(model, prompt, 3, 10, penalty, stops, early)
        check_rows(found.outputs, truth)
        reasons = ["stop" if tokens[-1] in stops else "length" for tokens, _ in truth]
        assert [output.finish_reason for output in found.outputs] == reasons
    llm.close()


@pytest.mark.parametrize("seed", [2, 5])
def test_a_beam_that_is_behind_may_still_win_where_length_is_rewarded(seed: int) -> None:
    model, often = talkative_model(seed), list(range(0, 96, 3))
    llm = LLM(model, tokenizer=CharacterTokenizer(), config=small())
    (found,) = llm.generate([PROMPT], beams(2, 14, length_penalty=3.0, stop_token_ids=often))
    check_rows(found.outputs, plain_search(model, PROMPT, 2, 14, 3.0, {EOS, *often}, False))
    llm.close()


def test_a_search_ends_as_soon_as_no_running_beam_can_win() -> None:
    model = talkative_model(1)
    engine = Engine(model, small())
    (truth, *_), *_ = plain_search(model, PROMPT, 2, 60, 0.0, {EOS}, False)
    engine.add_request("beams", PROMPT, beams(2, 60, length_penalty=0.0))
    num_steps = 0
    while engine.has_work:
        outputs = engine.step()
        engine.check()
        num_steps += 1
    assert len(truth) <= num_steps < 40
    assert outputs[0].request.selector.best[0].token_ids == truth


def test_beams_share_the_blocks_of_what_they_have_in_common() -> None:
    engine = Engine(TinyModel(), small())
    engine.add_request("beams", list(range(40)), beams(8, 4, ignore_eos=True))
    engine.step()
    engine.step()
    assert engine.memory.num_blocks_used < 10 + 2 * 8
    assert engine.last_stats.num_blocks_shared > 0
    engine.abort("beams")
    assert {str(output.finish_reason) for output in engine.step()} == {"abort"}
    assert engine.memory.num_blocks_used == 0


def test_a_stream_tells_beams_when_they_are_known_and_a_cancelled_search_ends() -> None:
    model = talkative_model()
    with AsyncEngine(model, tokenizer=CharacterTokenizer(), config=small()) as engine:
        stream = engine.submit(PROMPT, beams(3, 12))
        deltas = list(stream)
        truth = plain_search(model, PROMPT, 3, 12, 1.0, {EOS}, False)
        assert [list(delta.token_ids) for delta in deltas] == [tokens for tokens, _ in truth]
        assert stream.result(30).metrics.time_to_first_token_s is not None
        cancelled = engine.submit(PROMPT, beams(3, 400, ignore_eos=True))
        cancelled.cancel()
        assert {output.finish_reason for output in cancelled.result(30).outputs} == {"abort"}


def test_text_leaves_the_stop_token_out_unless_asked_for() -> None:
    model, tokenizer = talkative_model(1), CharacterTokenizer()
    llm = LLM(model, tokenizer=tokenizer, config=small())
    for extra in ({}, {"include_stop_str_in_output": True, "skip_special_tokens": False}):
        (found,) = llm.generate([PROMPT], beams(3, 10, length_penalty=-2.0, **extra))
        ended = [output for output in found.outputs if output.finish_reason == "stop"]
        assert ended
        for output in ended:
            spoken = output.token_ids if extra else output.token_ids[:-1]
            assert output.text == tokenizer.decode(spoken)
    llm.close()


def test_a_search_wider_than_the_vocabulary_ends_with_an_error_that_says_so() -> None:
    llm = LLM(AlphabetModel(), tokenizer=CharacterTokenizer(), config=small(max_num_seqs=128))
    (found,) = llm.generate(["A"], beams(VOCAB, 3))
    assert f"fewer than {VOCAB} continuations; ask for a smaller n" in found.error
    assert llm.generate(["A"], SamplingParams(max_tokens=3))[0].outputs[0].text == "BCD"
    llm.close()


@pytest.mark.parametrize("num_others", [0, 1, 2])
@pytest.mark.parametrize("penalty", [-2.0, 1.0, 3.0])
def test_a_search_whose_best_are_known_needs_no_continuations(num_others: int, penalty: float) -> None:
    """Nearly all of the vocabulary are stop tokens: sequences end at once, or go on in fewer beams than were asked."""
    model, stops = TinyModel(1), list(range(num_others, VOCAB))
    llm = LLM(model, tokenizer=CharacterTokenizer(), config=small())
    for prompt in (PROMPT, [40, 41]):
        (found,) = llm.generate([prompt], beams(3, 6, length_penalty=penalty, stop_token_ids=stops))
        truth = plain_search(model, prompt, 3, 6, penalty, {*stops}, False)
        check_rows(found.outputs, truth)
        assert {output.finish_reason for output in found.outputs} <= {"stop", "length"}
    llm.close()


@pytest.mark.parametrize(
    ("worth", "told"),
    [(float("nan"), "hold NaN"), (float("inf"), "hold +inf"), (float("-inf"), "are -inf for every token")],
)
def test_logits_without_a_likeliest_token_are_told_as_what_they_are(worth: float, told: str) -> None:
    class Broken(TinyModel):
        def forward(self, token_ids: Any, positions: Any, attend: Any, sample_indices: Any) -> torch.Tensor:
            logits = super().forward(token_ids, positions, attend, sample_indices)
            logits[token_ids[sample_indices] == 13] = worth
            return logits

    llm = LLM(Broken(), tokenizer=CharacterTokenizer(), config=small())
    broken, sound = llm.generate([[1, 13], PROMPT], [beams(2, 3), beams(2, 3)])
    assert {output.finish_reason for output in broken.outputs} == {"error"}
    assert broken.error == f"the model's logits {told}"
    check_rows(sound.outputs, plain_search(TinyModel(), PROMPT, 2, 3, 1.0, {EOS}, False))
    llm.close()


def test_logits_processors_of_plugins_are_not_passed_over_in_silence() -> None:
    class Plugin:
        @hookimpl
        def create_logits_processor(self, request: Any) -> Any:
            return lambda ids, scores: scores

    engine = Engine(TinyModel(), small(), plugins=[Plugin()])
    with pytest.raises(InvalidRequestError, match="logits_processors can't go with use_beam_search"):
        engine.add_request("beams", PROMPT, beams(2, 4))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.7}, "temperature is 0.7, but use_beam_search draws nothing"),
        ({"top_k": 5}, "top_k can't go with use_beam_search; leave it out, or sample with n"),
        ({"logprobs": 0}, "logprobs can't"),
        ({"stop": "x"}, "stop can't"),
        ({"logits_processors": [lambda ids, scores: scores]}, "logits_processors can't"),
        ({"early_stopping": "never"}, "early_stopping is 'never'; it must be True, or False"),
        ({"length_penalty": 99}, "length_penalty is 99; it must be a number from -20 to 20"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty needs use_beam_search"),
    ],
)
def test_what_beams_cannot_honour_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**{"use_beam_search": True, "n": 2, **fields})


def test_beams_over_the_protocol_are_the_engines_best_first() -> None:
    alphabet = Alphabet()
    with alphabet.engine:
        body = {"prompt": "A", "max_tokens": 4, "n": 2, "best_of": 3, "use_beam_search": True, "length_penalty": 0.5,
                "early_stopping": False, "temperature": 0}  # fmt: skip
        answer = alphabet.answer(CompletionCall(body, alphabet.served, "1"))
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["choices"][0]["text"] == "BCDE"
        assert answer["choices"][1]["text"] != "BCDE"
        assert answer["usage"]["completion_tokens"] == 12
        (expected,) = LLM(
            AlphabetModel(), tokenizer=CharacterTokenizer(), attention_backend="reference", num_blocks=256
        ).generate(["A"], beams(3, 4, length_penalty=0.5))
        assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected.outputs[:2]]
        messages = [{"role": "user", "content": "x"}]
        chat = {"messages": messages, "max_tokens": 4, "n": 2, "use_beam_search": True}
        answer = alphabet.answer(ChatCall(chat, alphabet.served, "2"))
        assert answer["choices"][0]["message"]["content"] == ";<=>"
        assert len(answer["choices"]) == 2

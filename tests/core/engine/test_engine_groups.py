"""Groups of rows whose tokens a caller's own selector chooses: beams, and groups that are held."""

from functools import partial

import pytest
import torch

from mixed_workload import ROOMY, TIGHT, greedy, in_every_size
from paged_core import (
    FinishReason,
    InvalidRequestError,
    Selection,
)
from tiny_engine import run, tiny_engine, tokens_of
from tiny_model import VOCAB, TinyModel

make_engine = partial(tiny_engine, max_num_batched_tokens=256)


class BeamSelector:
    """Plain beam search over one lockstep group: sums of log-probabilities, no length penalty."""

    def __init__(self, num_beams):
        self.scores = torch.tensor([0.0] + [-1e9] * (num_beams - 1))

    def select(self, logits, requests):
        total = self.scores[:, None] + logits.log_softmax(-1)  # [beams, V]
        best = total.flatten().topk(len(requests))
        self.scores = best.values
        return Selection((best.indices % VOCAB).tolist(), parents=(best.indices // VOCAB).tolist())


def beam_search(model, prompt, num_beams, num_tokens):
    beams = [(0.0, [])]
    for _ in range(num_tokens):
        candidates = []
        for score, tokens in beams:
            all_ids = torch.tensor(prompt + tokens)
            last = torch.tensor([len(all_ids) - 1])
            logits = model.forward(all_ids, torch.arange(len(all_ids)), model.dense, last)
            values, ids = logits[0].log_softmax(-1).topk(num_beams)
            candidates += [(score + float(v), [*tokens, int(t)]) for v, t in zip(values, ids, strict=True)]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
    return [tokens for _, tokens in beams]


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_beams_in_lockstep_over_forked_blocks_find_what_plain_beam_search_finds(config):
    model, prompt = TinyModel(), [8, 6, 7, 5, 3, 0, 9]
    engine = make_engine(model, **config)
    for i in range(4):
        engine.add_request(f"busy{i}", [i] * 18, greedy(20))
    rows = engine.add_group("beams", [prompt] * 4, greedy(12), selector=BeamSelector(4))
    outputs = run(engine)
    assert [row.output_token_ids for row in rows] == beam_search(model, prompt, 4, 12)
    assert tokens_of(outputs)["busy2", 0] == model.generate([2] * 18, 20)


class LaterSelector:
    """Keeps what it is shown; the tokens come later, through ``Engine.resume``."""

    def __init__(self):
        self.logits = {}  # by request: f32 [V]

    def select(self, logits, requests):
        self.logits.update(zip(requests, logits, strict=True))
        return Selection([None] * len(requests))


@in_every_size
def test_beams_whose_tokens_are_brought_from_outside_are_those_of_plain_beam_search(config):
    model, prompt = TinyModel(), [8, 6, 7, 5, 3, 0, 9]
    engine = make_engine(model, **config)
    for i in range(4):
        engine.add_request(f"busy{i}", [i] * 18, greedy(20))
    later, beams = LaterSelector(), BeamSelector(4)
    rows = engine.add_group("beams", [prompt] * 4, greedy(13), selector=later)
    outputs = []
    for _ in range(12):
        while not all(row.held for row in rows):
            outputs += engine.step()
            engine.check()
        choice = beams.select(torch.stack([later.logits[row] for row in rows]), rows)
        engine.resume(rows, choice.token_ids, choice.parents)
    assert [row.output_token_ids for row in rows] == beam_search(model, prompt, 4, 12)
    engine.abort("beams")
    outputs += run(engine)
    assert tokens_of(outputs)["busy2", 0] == model.generate([2] * 18, 20)


def test_rows_of_a_group_with_one_prompt_share_the_blocks_of_that_prompt():
    engine, later = make_engine(), LaterSelector()
    rows = engine.add_group("same", [[5] * 10, [6] * 9, [5] * 10, [5] * 10], greedy(4), selector=later)
    engine.step()
    assert all(row.held for row in rows)
    assert engine.last_stats.num_tokens == 19, "each prompt is computed once"
    assert engine.last_stats.num_blocks_used == 3 + 3
    assert torch.equal(later.logits[rows[0]], later.logits[rows[3]])
    engine.resume(rows, [1, 1, 2, 3])
    engine.step()
    engine.check()
    assert engine.memory.num_blocks_used == 6 + 2, "two of the three rows that share a half-filled block have copied it"
    truth = TinyModel().generate([5] * 10 + [3], 1)
    assert [int(later.logits[rows[3]].argmax())] == truth


def test_a_group_that_cant_be_served_is_refused():
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="at least one prompt"):
        engine.add_group("empty", [], greedy(4), selector=LaterSelector())
    with pytest.raises(InvalidRequestError, match=r"prompt_logprobs.*add_request"):
        engine.add_group("asks", [[1, 2], [3]], greedy(4, prompt_logprobs=0), selector=LaterSelector())
    assert not engine.has_work
    assert engine.num_open == 0


def test_a_held_group_gives_way_to_others_and_goes_on_when_it_is_resumed():
    model, later = TinyModel(), LaterSelector()
    engine = make_engine(model, num_blocks=12, watermark=0)
    engine.add_request("old", [3] * 20, greedy(20))
    rows = engine.add_group("held", [[7] * 9], greedy(8), selector=later)
    outputs = [output for _ in range(19) for output in engine.step()]
    assert rows[0].held and not rows[0].block_table, "its blocks went to the older request"
    engine.resume(rows, [9])
    while not (rows[0].held and len(rows[0].tokens) == rows[0].num_computed):
        outputs += engine.step()
    assert [int(later.logits[rows[0]].argmax())] == model.generate([7] * 9 + [9], 1)
    assert tokens_of(outputs)["old", 0] == model.generate([3] * 20, 20)


def test_an_engine_whose_requests_are_all_held_has_nothing_to_do():
    engine = make_engine()
    rows = engine.add_group("held", [[7] * 8], greedy(8), selector=LaterSelector())
    engine.step()
    assert not engine.has_work
    assert engine.step() == []
    with pytest.raises(InvalidRequestError, match="token id 4000 was chosen; ids go from 0 to"):
        engine.resume(rows, [4000])
    engine.resume(rows, [1])
    with pytest.raises(InvalidRequestError, match="isn't held: there is nothing to resume"):
        engine.resume(rows, [1])
    engine.abort("held")
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]

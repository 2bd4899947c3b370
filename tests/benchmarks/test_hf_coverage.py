"""The coverage table: right tiers, no wrong answer let through, and one model's crash is nobody else's."""

import re

import pytest
import torch

from paged_coverage import __main__ as command
from paged_coverage import check as checks
from paged_coverage import isolated, table, tiny
from paged_coverage.check import NATIVE, NOT_BUILT, STOCK, TIERS, WRONG, GeneratedAnswer, Row, check
from paged_hf.generate.patched import PagedGenerate
from places import ROOT

DOCS = ROOT / "docs/coverage.md"


def ignore(step):
    pass


def answer(tokens, logits):
    return GeneratedAnswer(torch.tensor(tokens), torch.tensor(logits))


# ---- the script ------------------------------------------------------------------------------------------------


def test_the_script_prints_the_tier_of_each_model_it_is_asked_for(capsys):
    assert command.main(["--only", "gemma2,jamba,mamba"]) == 0
    out = capsys.readouterr().out
    lines = [line.split()[:4] for line in out.splitlines()]
    assert lines[:3] == [
        ["1/3", "gemma2", "Gemma2ForCausalLM", "native"],
        ["2/3", "jamba", "JambaForCausalLM", "second"],
        ["3/3", "mamba", "MambaForCausalLM", "stock"],
    ]
    assert "sliding window, softcap" in out
    assert out.endswith("1 native, 1 second tier, 1 stock\n")


def test_a_model_type_that_transformers_has_not_is_named(capsys):
    assert command.main(["--only", "llama,no_such"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_a_table_of_some_models_is_not_written_as_if_it_were_all(capsys, tmp_path):
    with pytest.raises(SystemExit):
        command.main(["--only", "llama", "--out", str(tmp_path / "coverage.md")])
    assert "not allowed" in capsys.readouterr().err


def test_a_wrong_answer_makes_the_script_fail(monkeypatch, capsys):
    rows = [Row("llama", "LlamaForCausalLM", WRONG, "prompt 0"), Row("gpt2", "GPT2LMHeadModel", NATIVE, "")]
    monkeypatch.setattr(isolated, "check_all", lambda *_: iter(rows))
    assert command.main(["--only", "llama,gpt2"]) == 1
    assert "1 WRONG" in capsys.readouterr().out


def test_a_model_that_crashes_or_hangs_ends_only_itself(tmp_path, monkeypatch):
    (tmp_path / "troubles.py").write_text(
        "import os, time\n"
        "from paged_coverage.check import Row\n"
        "def check(model_type, at):\n"
        "    at('the engine')\n"
        "    if model_type == 'gpt2': os.abort()\n"
        "    if model_type == 'opt': time.sleep(60)\n"
        "    if model_type == 'phi': at('building it') or os._exit(3)\n"
        "    return Row(model_type, '', 'native', '')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import troubles

    rows = {row.model_type: row for row in isolated.check_all(["gpt2", "opt", "phi", "llama"], troubles.check, 2, 3.0)}
    assert (rows["gpt2"].tier, rows["gpt2"].reason) == (WRONG, "the process died (-6) at: the engine")
    assert (rows["opt"].tier, rows["opt"].reason) == (WRONG, "the engine took more than 3 s")
    assert (rows["phi"].tier, rows["phi"].reason) == (NOT_BUILT, "the process died (3) at: building it")
    assert rows["llama"].tier == NATIVE


# ---- what counts as the same answer ----------------------------------------------------------------------------


def test_other_tokens_are_a_difference_unless_stock_itself_was_undecided():
    clear = answer([[1, 2]], [[[0.0, 3.0, 1.0]], [[0.0, 1.0, 3.0]]])
    tie = answer([[1, 2]], [[[0.0, 3.0, 3.0]], [[0.0, 1.0, 3.0]]])
    (row,) = clear.rows()
    assert clear.difference([row]) is None
    assert "new token 1 is 0, not 2" in clear.difference([[row[0], (0, row[1][1])]])
    assert "1 new tokens, not 2" in clear.difference([row[:1]])
    (row,) = tie.rows()
    assert tie.difference([[(2, row[0][1]), (0, -9.0)]]) is None


def test_where_rounding_may_decide_the_nearest_token_may_be_another_and_no_other_one():
    logits = [[[0.0, 3.0, 2.9]]]
    narrow = GeneratedAnswer(torch.tensor([[1]]), torch.tensor(logits), doubt=torch.tensor([[0.2]]))
    assert narrow.difference([[(2, None)]]) is None
    assert "new token 0 is 0, not 1" in narrow.difference([[(0, None)]])
    assert "new token 0 is 2, not 1" in answer([[1]], logits).difference([[(2, None)]])


def test_one_prompt_of_three_may_have_met_other_experts_where_weights_have_16_bits():
    logits = torch.tensor([[[0.0, 3.0, 2.9]] * 3])
    narrow = GeneratedAnswer(torch.tensor([[1]] * 3), logits, doubt=torch.full((1, 3), 0.2))
    right, wrong = [(1, None)], [(0, None)]
    assert narrow.difference([right, wrong, right]) is None
    assert "prompt 1, new token 0 is 0" in narrow.difference([right, wrong, wrong])
    assert "prompt 1" in GeneratedAnswer(narrow.tokens, logits).difference([right, wrong, right])


def test_the_same_tokens_with_other_probabilities_are_a_difference():
    stock = answer([[1]], [[[0.0, 3.0, 1.0]]])
    ((token, logprob),) = stock.rows()[0]
    assert stock.difference([[(token, logprob + 1e-5)]]) is None
    assert "log-probability" in stock.difference([[(token, logprob + 0.01)]])
    assert "log-probability" in stock.difference([[(token, float("nan"))]])


def test_an_engine_that_answers_otherwise_is_wrong(monkeypatch):
    engine = checks._paged
    monkeypatch.setattr(checks, "_paged", lambda own: [[(5, p) for _, p in row] for row in engine(own)])
    row = check("llama", ignore)
    assert row.tier == WRONG
    assert row.reason.startswith("the engine with plain attention: prompt 0, new token 0 is 5, not ")


def test_a_generate_that_answers_otherwise_is_wrong(monkeypatch):
    monkeypatch.setattr(PagedGenerate, "__call__", lambda own, ids, **options: own.stock(ids, **options) * 0 + 5)
    row = check("llama", ignore)
    assert row.tier == WRONG
    assert row.reason.startswith("paged_generate: prompt 0, new token 0 is 5, not ")


@pytest.mark.parametrize("dtype", checks.HALVES, ids=str)
def test_an_answer_that_is_wrong_only_with_weights_of_16_bits_is_wrong(dtype, monkeypatch):
    run = PagedGenerate.__call__

    def wrong(own, ids, **options):
        return own.stock(ids, **options) * 0 + 5 if own.model.dtype is dtype else run(own, ids, **options)

    monkeypatch.setattr(PagedGenerate, "__call__", wrong)
    row = check("llama", ignore)
    assert row.tier == WRONG and row.halves[checks.HALVES.index(dtype)] == WRONG
    assert row.reason.startswith(f"{str(dtype)[6:]}: paged_generate: prompt 0, new token 0 is 5, not ")


def test_models_with_weights_of_16_bits_run_natively_too():
    row = check("gemma2", ignore)
    assert (row.tier, row.halves) == (NATIVE, (NATIVE, NATIVE))


def test_a_model_that_cannot_be_made_is_not_built_and_says_why(monkeypatch):
    def fails(model_type):
        raise ImportError("it needs\n  a package")

    monkeypatch.setattr(checks, "tiny_model", fails)
    assert check("llama", ignore) == Row("llama", "LlamaForCausalLM", NOT_BUILT, "ImportError: it needs a package")


# ---- tiny models -----------------------------------------------------------------------------------------------


def test_tiny_models_keep_a_layer_of_each_kind_and_are_tiny():
    config = tiny.tiny_config("gemma3_text")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert (config.num_hidden_layers, config.sliding_window, config.num_key_value_heads) == (4, tiny.WINDOW, 2)
    assert sum(weight.numel() for weight in tiny.tiny_model("gemma3_text").parameters()) < 300_000


# ---- docs/coverage.md ------------------------------------------------------------------------------------------


def test_the_summary_in_the_docs_counts_what_its_own_table_says():
    text = DOCS.read_text(encoding="utf-8")
    summary = {tier: int(count) for tier, count in re.findall(r"^\| ([\w ]+) \| (\d+) \| ", text, re.MULTILINE)}
    tiers = re.findall(r"^\| \S+ \| \w+ \| ([\w ]+) \| ", text, re.MULTILINE)
    assert summary == {tier: tiers.count(tier) for tier in TIERS}
    assert f"All {len(tiers)} entries" in text
    assert summary[WRONG] == 0
    assert summary[NATIVE] >= 114


def test_reasons_do_not_break_the_table():
    rows = [Row("a", "A", STOCK, "x | y\\z <b>"), Row("b", "B", NATIVE, "w" * 500)]
    lines = [line for line in table.markdown(rows).splitlines() if line.startswith(("| a", "| b"))]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [7, 7]
    assert max(map(len, lines)) < 260

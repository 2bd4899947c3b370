"""Releases of transformers differ: what that changes stands in one file, and what it breaks is told at the patch."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import CamembertForCausalLM, DynamicCache, LlamaForCausalLM

from generate_parity import some_rows
from paged_core import UnsupportedModel
from paged_hf import paged_generate, upstream
from places import ROOT

ADAPTER = ROOT / "adapters/hf/paged_hf"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
FULL = {"return_dict_in_generate": True}


# ---- one file spells what may be called otherwise tomorrow ---------------------------------------------------------

RENAMED = {"past_key_values", "cache_params", "ALL_CACHE_NAMES", "_is_user_defined"}
SINGLE_MODELS = {"rules.py", "stand_ins.py"}  # they know the modules of the models that they stand for
OF_TORCH = {*dir(nn.Module), *dir(torch.Tensor), *vars(nn.Module()), *dir(torch_module), *dir(nn.modules.dropout)}
OF_OTHERS = {
    *("_orig_mod", "_schema", "_torchdynamo_orig_callable", "_dynamo_"),  # torch's: compiled modules, operators
    *("_hf_hook", "_old_forward"),  # accelerate's
    "_original_forward_func",  # compressed-tensors'
    *("_slotnames", "_lru_cache_wrapper", "_abc_impl"),  # Python's
}


def spelled(path: Path) -> Iterator[tuple[str, int]]:
    """Names in a file, with their lines: attributes, arguments by name, keys and other strings that are names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.keyword | ast.arg) and node.arg is not None:
            yield node.arg, node.value.lineno if isinstance(node, ast.keyword) else node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value, node.lineno


def our_own(files: list[Path]) -> set[str]:
    """Private names that the adapter makes itself: what it defines, and what it sets on its own objects."""
    made = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_paged"):
            made.add(node.value)
    return made


def test_only_the_seam_spells_what_a_release_may_rename() -> None:
    files = [path for path in sorted(ADAPTER.rglob("*.py")) if path.name != "upstream.py"]
    own = our_own(files) | OF_TORCH | OF_OTHERS
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for name, line in spelled(path)
        if name in RENAMED or (re.match("_[a-z]", name) and name not in own and path.name not in SINGLE_MODELS)
    ]
    assert not found, "transformers' own names belong in paged_hf/upstream.py:\n" + "\n".join(found)


def test_only_the_seam_reaches_into_transformers_modules() -> None:
    reach = re.compile(r"^\s*(?:from|import) transformers\.[\w.]+|[\"']transformers\.\w+\.\w", re.MULTILINE)
    files = [path for path in sorted(ADAPTER.rglob("*.py")) if path.name != "upstream.py"]
    assert not {path.name: told for path in files if (told := reach.findall(path.read_text()))}


def test_the_core_spells_none_of_these_names() -> None:
    for path in sorted((ROOT / "paged_core").rglob("*.py")):
        assert not RENAMED & {name for name, _ in spelled(path)}, path


# ---- names are found by looking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_values", "cache", "kv_of_tomorrow"])
def test_a_cache_is_found_whatever_it_is_called(name: str) -> None:
    cache, other = DynamicCache(), DynamicCache()
    arguments = {"attention_mask": None, name: cache, "use_cache": True}
    assert upstream.cache_in(arguments) is cache
    assert upstream.with_cache(arguments, other) == {**arguments, name: other}
    assert upstream.without_cache(arguments) == {"attention_mask": None, "use_cache": True}


def test_a_cache_that_is_none_has_the_usual_name() -> None:
    assert upstream.cache_in({"use_cache": False}) is None
    cache = DynamicCache()
    assert upstream.with_cache({}, cache) == {upstream.CACHE: cache}


def test_the_name_of_a_forwards_cache_is_in_its_signature() -> None:
    def forward(input_ids: Any, kv: DynamicCache | None = None) -> None: ...

    assert upstream.cache_argument(forward) == "kv"
    assert upstream.cache_argument(LlamaForCausalLM.forward) == upstream.CACHE
    assert upstream.cache_argument(CamembertForCausalLM.forward) == upstream.CACHE, "a tuple, by its signature"


# ---- a release that switches the project off is told of ------------------------------------------------------------


class OtherPositions(LlamaForCausalLM):
    """As a release would look like whose forwards call position_ids otherwise."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, places: Any = None, **rest: Any) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=places, **rest)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["places"] = inputs.pop("position_ids", None)
        return inputs


class MoreForLoops(LlamaForCausalLM):
    """As a release would look like that hands its loops, and the forward, something new."""

    def forward(self, *args: Any, novelty: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _prepare_cache_for_generation(self, config: Any, model_kwargs: Any, *rest: Any) -> None:
        super()._prepare_cache_for_generation(config, model_kwargs, *rest)
        model_kwargs["novelty"] = torch.ones(1)


class OtherLoops(LlamaForCausalLM):
    """As a release would look like whose loops have other names."""


for kind in (OtherPositions, MoreForLoops, OtherLoops):
    kind.prepare_inputs_for_generation.__module__ = "transformers.generation.utils"

STAND_INS = {
    OtherPositions: "takes no position_ids",
    MoreForLoops: "novelty is passed to the model",
    OtherLoops: "calls none of the decoding loops that are known",
}


@pytest.fixture(params=STAND_INS, ids=lambda kind: kind.__name__)
def release(request: Any, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose class stands for all of a release."""
    model = tiny("llama")
    model.__class__ = request.param
    if request.param is OtherLoops:
        monkeypatch.setattr(upstream, "LOOPS", ("_decode",))
    return model


def test_a_release_that_switches_the_native_tier_off_is_told_of_once_at_the_patch(
    release: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "paged_hf"):
        patched = paged_generate(release)
    [told] = [record.getMessage() for record in caplog.records if record.name == "paged_hf"]
    assert type(release).__name__ in told
    assert STAND_INS[type(release)] in told
    assert "docs/coverage.md" in told or "5.24.0" in told
    ids, mask = some_rows((7, 4))
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    assert torch.equal(patched(**given), patched.stock(**given))


def test_strict_raises_instead(release: Any) -> None:
    with pytest.raises(UnsupportedModel, match=STAND_INS[type(release)]):
        paged_generate(release, strict=True)
    assert "generate" not in vars(release)


def test_strict_is_content_with_a_model_that_runs_natively(
    tiny: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    with caplog.at_level(logging.WARNING, "paged_hf"):
        model.generate = paged_generate(model, strict=True)
    assert not caplog.records
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(UnsupportedModel, match="forward hook on lm_head"):
        paged_generate(model, strict=True)
    handle.remove()
    assert paged_generate(model, strict=True) is model.generate


def test_strict_needs_the_check(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="strict=True goes by what the self-check finds"):
        paged_generate(tiny("llama"), strict=True, check=False)


@pytest.mark.parametrize(("family", "reason"), [("t5gemma", "encoder-decoder"), ("mamba", "Mamba")])
def test_models_that_can_never_run_natively_are_told_of_too(tiny: Callable[..., Any], family: str, reason: str) -> None:
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ) if family == "t5gemma" else tiny("mamba", head_dim=None)  # fmt: skip
    with pytest.raises(UnsupportedModel, match=reason):
        paged_generate(model, strict=True)


def test_an_untested_release_is_named_beside_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.transformers, "__version__", "5.99.0")
    assert "transformers 5.99.0 is installed" in upstream.way_out()
    pinned = re.findall(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and all(version in upstream.way_out() for version in pinned)
    for version in pinned:
        monkeypatch.setattr(upstream.transformers, "__version__", version)
        assert "coverage.md" in upstream.way_out()


# ---- stock's own deprecations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama4_text", "mpt"])
def test_nothing_of_ours_calls_transformers_by_names_that_are_going(
    family: str, tiny: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    own = {"gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4}, "mpt": {"d_model": 48, "n_heads": 4, "n_layers": 2}}
    sizes = {"head_dim": None, "num_key_value_heads": None, **own[family]} if family in own else {}
    model = tiny(family, **sizes)
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # it says everything once a process
    ids, mask = some_rows((7, 4))
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    with caplog.at_level(logging.WARNING):
        patched = paged_generate(model)  # FutureWarnings are errors here
        for mode in ({}, FULL, {"num_beams": 2}, {"num_beams": 2, **FULL}, {"do_sample": True}, {"use_cache": False}):
            patched(**{**given, **mode})
        handle = model.register_forward_hook(lambda module, args, out: None)
        patched(**given, **FULL, use_cache=True)
        assert patched.last_report().tier == "cache"
        handle.remove()
    assert "deprecated" not in caplog.text

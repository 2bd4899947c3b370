"""Archives and settings that can't be served are refused by the command that makes them."""

from __future__ import annotations

import tarfile
import zipfile
from typing import Any

import pytest
import torch
import transformers

from paged_core import ConfigError
from paged_core.cli import main
from paged_torchserve.devices import choose_devices
from paged_torchserve.models import find_model
from paged_torchserve.opening import _source, open_engines
from paged_torchserve.settings import SectionSettings
from torchserve_archives import contents, refused, swap


def test_pickled_weights_are_refused_unless_allowed(stock, model, tmp_path, capsys):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    old, new = stock(model), tmp_path / "new.mar"
    assert "--allow-pickle" in refused(capsys, "swap", old, new)
    assert not new.exists()
    assert swap(old, new, "--allow-pickle") == 0
    assert contents(new)[2]["paged"]["allow_pickle"] is True


def test_an_archive_without_a_model_of_ours_is_refused(stock, model, tmp_path, capsys):
    (model / "config.json").write_text('{"lr": 1}')
    assert "no Hugging Face model" in refused(capsys, "swap", stock(model), tmp_path / "new.mar")
    assert not list(tmp_path.glob("*new.mar*"))


def test_a_model_that_writes_no_text_is_refused(stock, model, tmp_path, capsys):
    (model / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}')
    assert "BertForSequenceClassification" in refused(capsys, "swap", stock(model), tmp_path / "new.mar")


def test_files_that_are_no_archives_are_refused(stock, model, tmp_path, capsys):
    new = tmp_path / "new.mar"
    assert "doesn't exist" in refused(capsys, "swap", tmp_path / "none.mar", new)
    (tmp_path / "text.mar").write_text("hello")
    assert "no zip file" in refused(capsys, "swap", tmp_path / "text.mar", new)
    with zipfile.ZipFile(tmp_path / "other.mar", "w") as other:
        other.writestr("config.json", "{}")
    assert "no TorchServe archive" in refused(capsys, "swap", tmp_path / "other.mar", new)
    with zipfile.ZipFile(tmp_path / "bad.mar", "w") as bad:
        bad.writestr("MAR-INF/MANIFEST.json", '{"model": 7}')
    assert "can't be read" in refused(capsys, "swap", tmp_path / "bad.mar", new)
    whole = stock(model).read_bytes()
    (tmp_path / "cut.mar").write_bytes(whole[: len(whole) // 2])
    assert "no zip file" in refused(capsys, "swap", tmp_path / "cut.mar", new)
    with tarfile.open(tmp_path / "tar.mar", "w:gz") as tar:
        tar.add(model)
    assert "unpack it" in refused(capsys, "swap", tmp_path / "tar.mar", new)
    assert not new.exists()


def test_a_model_may_be_a_folder_of_the_machine_that_serves(model, tmp_path):
    assert _source(tmp_path / "unpacked", SectionSettings(model=str(model))) == str(model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickles"):
        _source(tmp_path / "unpacked", SectionSettings(model=str(model)))


@pytest.mark.parametrize(("allow_pickle", "safe"), [(False, True), (True, None)])
def test_pickles_of_a_hub_id_are_read_only_if_allowed(monkeypatch, tmp_path, allow_pickle, safe):
    asked: dict[str, Any] = {}

    def from_pretrained(source: str, **options: Any) -> Any:
        asked.update(options, source=source)
        raise OSError("no such model")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    settings = SectionSettings(model="some/model", trust_remote_code=True, allow_pickle=allow_pickle)
    with pytest.raises(OSError, match="no such model"):
        open_engines(tmp_path, ["cpu"], settings, [[]])
    assert (asked["source"], asked["use_safetensors"]) == ("some/model", safe)
    asked.clear()
    with pytest.raises(ConfigError, match="no such model"):
        open_engines(tmp_path, ["cpu"], SectionSettings(model="some/model"), [[]])
    assert asked["use_safetensors"] is True


def test_the_worker_runs_on_the_gpu_that_torchserve_gave_it_unless_the_settings_say_otherwise(monkeypatch, tmp_path):
    asked: list[Any] = []

    def load(source: str, **options: Any) -> Any:
        asked.append((options.get("device_map"), options["dtype"]))
        raise OSError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(
        "paged_hf.loading.load._check_device", lambda device: None
    )  # a machine without GPUs can tell too
    for gpu_id, device in [(None, None), (0, None), (3, None), (3, "cpu"), (None, "cuda:1"), (0, "auto")]:
        with pytest.raises(ConfigError):
            settings = SectionSettings(model="some/model", device=device, dtype="bfloat16")
            open_engines(tmp_path, choose_devices(gpu_id, [gpu_id or 0], settings), settings, [[]])
    assert [place for place, _ in asked] == [None, "cuda:0", "cuda:3", None, "cuda:1", "auto"]
    assert {dtype for _, dtype in asked} == {torch.bfloat16}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"parallelType: custom .*tensor_parallel_size"):
        open_engines(tmp_path, ["cuda:0"], SectionSettings(model="some/model"), [[]])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("max_num_request=3", "max_num_requests"),
        ("max_num_seqs=three", "must be int"),
        ("batchSize=0", "at least 1"),
        ("num_blocks=0", "at least 1"),
        ("nonsense", "KEY=VALUE"),
        ("seed=[", "can't be read"),
    ],
)
def test_a_wrong_setting_is_named(stock, model, tmp_path, capsys, setting, told):
    assert told in refused(capsys, "archive", model, tmp_path / "new.mar", "--set", setting)
    assert not (tmp_path / "new.mar").exists()


def test_nothing_is_written_over_unless_forced(model, tmp_path, capsys):
    new = tmp_path / "new.mar"
    new.write_text("precious")
    assert "--force" in refused(capsys, "archive", model, new)
    assert new.read_text() == "precious"
    assert main(["torchserve", "archive", str(model), str(new), "--force"]) == 0
    assert ".mar" in refused(capsys, "archive", model, tmp_path / "new.zip")


def test_of_several_models_inside_one_must_be_named():
    files = {"a/config.json": b'{"model_type": "x"}', "b/config.json": b'{"model_type": "y"}', "config.json": b"{}"}
    with pytest.raises(ConfigError, match="say which"):
        find_model(files, files.__getitem__)
    assert find_model(files, files.__getitem__, "b").folder == "b"


@pytest.mark.parametrize("section", ["7", "[1, 2]", "text"])
def test_a_section_that_holds_no_keys_is_refused(stock, model, tmp_path, capsys, section):
    old = stock(model, f"paged: {section}\n")
    assert "must hold keys and values" in refused(capsys, "swap", old, tmp_path / "new.mar")

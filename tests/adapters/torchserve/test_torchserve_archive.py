"""Archives made by TorchServe's own archiver, and what ``paged torchserve`` makes of them and of folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from paged_core import ConfigError
from paged_core.cli import main
from paged_torchserve.models import find_model
from paged_torchserve.opening import _source, open_engine
from paged_torchserve.server import _model_name
from paged_torchserve.settings import Settings, read_settings

STOCK_CONFIG = """
minWorkers: 2
maxWorkers: 4
batchSize: 8
maxBatchDelay: 100
responseTimeout: 300
asyncCommunication: true
deviceType: cpu
handler:
  model_path: model
  max_new_tokens: 50
"""
WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the files of a model, as far as an archive is concerned."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def stock(tmp_path: Path) -> Any:
    """``stock(files, config)``: an archive as torch-model-archiver makes it, or its folder."""

    def make(extra_files: Path, config: str = STOCK_CONFIG, archive_format: str = "default") -> Path:
        handler, settings = tmp_path / "their_handler.py", tmp_path / "their-config.yaml"
        handler.write_text("class Theirs:\n    pass\n")
        settings.write_text(config)
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "old", "--version", "2.1",
                   "--handler", handler, "--extra-files", extra_files, "--config-file", settings,
                   "--export-path", tmp_path, "--archive-format", archive_format]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        return tmp_path / {"default": "old.mar", "no-archive": "old", "tgz": "old.tar.gz"}[archive_format]

    return make


def contents(archive: Path) -> tuple[dict[str, bytes], dict[str, Any], dict[str, Any]]:
    """(files, the manifest's model, the configuration), once as Java unpacks it: front to end."""
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        names = opened.namelist()
        assert len(names) == len(set(names))
        files = {name: opened.read(name) for name in names if not name.endswith("/")}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])["model"]
    return files, manifest, yaml.safe_load(files[manifest["configFile"]])


def swap(*args: Any) -> int:
    return main(["torchserve", "swap", *map(str, args)])


def test_a_swap_replaces_handler_and_mode_and_keeps_all_else(stock, model, tmp_path, capsys):
    old, new = stock(model), tmp_path / "new.mar"
    before = old.read_bytes()
    assert swap(old, new, "--set", "max_num_requests=16", "--set", "kv_cache_bytes=1000000") == 0
    files, manifest, config = contents(new)
    assert manifest == {"modelName": "old", "modelVersion": "2.1", "handler": "paged_torchserve.handler",
                        "configFile": "their-config.yaml"}  # fmt: skip
    assert config == {
        "minWorkers": 1, "maxWorkers": 1, "batchSize": 16, "maxBatchDelay": 1, "continuousBatching": True,
        "responseTimeout": 300, "startupTimeout": 600, "deviceType": "cpu",
        "handler": {"model_path": "model", "max_new_tokens": 50},
        "paged": {"max_new_tokens": 50, "kv_cache_bytes": 1000000},
    }  # fmt: skip
    theirs = contents_of_stock(old)
    changed = {"MAR-INF/MANIFEST.json", "their-config.yaml"}
    assert {name: body for name, body in files.items() if name not in changed} == {
        name: body for name, body in theirs.items() if name not in changed
    }
    assert files["model.safetensors"] == WEIGHTS
    assert old.read_bytes() == before
    told = capsys.readouterr().out
    for line in ("handler: paged_torchserve.handler (was their_handler.py)", "batchSize: 16 (was 8)",
                 "asyncCommunication: True is gone", "paged.kv_cache_bytes: 1000000"):  # fmt: skip
        assert line in told
    assert "responseTimeout" not in told


def contents_of_stock(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist() if not name.endswith("/")}


def test_weights_stay_as_they_were_packed_byte_for_byte(stock, model, tmp_path):
    old, new = stock(model), tmp_path / "new.mar"
    swap(old, new)
    with zipfile.ZipFile(old) as before, zipfile.ZipFile(new) as after:
        theirs, ours = before.getinfo("model.safetensors"), after.getinfo("model.safetensors")
        assert theirs.compress_type == ours.compress_type
        assert theirs.header_offset == ours.header_offset
    start = theirs.header_offset
    packed = slice(start, start + theirs.compress_size)
    assert old.read_bytes()[packed] == new.read_bytes()[packed]


def test_a_swapped_archive_can_be_swapped_again(stock, model, tmp_path):
    swap(stock(model), tmp_path / "one.mar", "--set", "max_num_seqs=7")
    assert swap(tmp_path / "one.mar", tmp_path / "two.mar", "--set", "seed=3") == 0
    _, _, config = contents(tmp_path / "two.mar")
    assert config["paged"] == {"max_new_tokens": 50, "max_num_seqs": 7, "seed": 3}


def test_a_model_in_a_folder_or_a_zip_inside_the_archive_is_found(stock, model, tmp_path):
    outer = tmp_path / "outer"
    (outer / "deep").mkdir(parents=True)
    shutil.move(model, outer / "deep" / "weights")
    swap(stock(outer), tmp_path / "new.mar")
    _, _, config = contents(tmp_path / "new.mar")
    assert config["paged"]["model"] == "deep/weights"

    packed = tmp_path / "packed"
    packed.mkdir()
    shutil.make_archive(str(packed / "model"), "zip", outer / "deep" / "weights")
    (tmp_path / "old.mar").unlink()
    swap(stock(packed), tmp_path / "zipped.mar")
    _, _, config = contents(tmp_path / "zipped.mar")
    assert config["paged"]["model"] == "model.zip"
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / "zipped.mar") as opened:
        opened.extractall(unpacked)
    folder = Path(_source(unpacked, read_settings(config)))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_the_folder_of_an_archive_can_be_swapped(stock, model, tmp_path):
    assert swap(stock(model, archive_format="no-archive"), tmp_path / "new.mar") == 0
    files, manifest, _ = contents(tmp_path / "new.mar")
    assert files["model.safetensors"] == WEIGHTS
    assert manifest["handler"] == "paged_torchserve.handler"


def test_an_archive_of_a_folder_leaves_out_hidden_files_and_other_formats_of_the_weights(model, tmp_path):
    (model / ".git").mkdir()
    (model / ".git" / "HEAD").write_text("x")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    assert main(["torchserve", "archive", str(model), str(tmp_path / "mine.mar"), "--set", "batchSize=4"]) == 0
    files, manifest, config = contents(tmp_path / "mine.mar")
    assert set(files) == {"MAR-INF/MANIFEST.json", "model-config.yaml", "config.json", "model.safetensors",
                          "tokenizer.json"}  # fmt: skip
    assert (manifest["modelName"], manifest["modelVersion"], config["batchSize"]) == ("mine", "1.0", 4)


def test_an_archive_may_name_a_hub_id_or_hold_a_gguf_file(tmp_path):
    assert main(["torchserve", "archive", "some/model", str(tmp_path / "hub.mar")]) == 0
    assert contents(tmp_path / "hub.mar")[2]["paged"] == {"model": "some/model"}
    assert _source(tmp_path, Settings(model="some/model")) == "some/model"
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert main(["torchserve", "archive", str(tmp_path / "m.gguf"), str(tmp_path / "gguf.mar")]) == 0
    assert contents(tmp_path / "gguf.mar")[2]["paged"] == {"model": "m.gguf"}
    assert _source(tmp_path, Settings(model="m.gguf")) == str(tmp_path / "m.gguf")


def test_rights_of_the_old_archive_are_not_kept_unless_they_are_given_anew_and_either_is_told(
    stock, model, tmp_path, capsys
):
    rights = "\npaged:\n  trust_remote_code: true\n  allow_pickle: true\n  seed: 3\n"
    old = stock(model, STOCK_CONFIG + rights)
    assert swap(old, tmp_path / "safe.mar") == 0
    told = capsys.readouterr().out
    assert contents(tmp_path / "safe.mar")[2]["paged"] == {"seed": 3, "max_new_tokens": 50}
    for key in ("trust_remote_code", "allow_pickle"):
        assert f"paged.{key} was on, and is off; --set {key}=true gives it anew" in told
    assert swap(old, tmp_path / "trusted.mar", "--set", "trust_remote_code=true", "--allow-pickle") == 0
    told = capsys.readouterr().out
    section = contents(tmp_path / "trusted.mar")[2]["paged"]
    assert (section["trust_remote_code"], section["allow_pickle"]) == (True, True)
    for key in ("trust_remote_code", "allow_pickle"):
        assert f"paged.{key} is on: what comes with the weights can run any code" in told


def test_an_archive_that_gives_nothing_but_rights_loses_its_section(stock, model, tmp_path):
    config = "paged:\n  trust_remote_code: true\n"
    assert swap(stock(model, config), tmp_path / "new.mar") == 0
    assert "paged" not in contents(tmp_path / "new.mar")[2]


# ---- what can't be used is refused -----------------------------------------------------------------------------


def refused(capsys: Any, *args: Any) -> str:
    assert main(["torchserve", *map(str, args)]) == 2
    return capsys.readouterr().err


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


def test_an_encrypted_archive_is_refused(stock, model, tmp_path, capsys):
    old = stock(model)
    encrypt(old)
    assert "encrypted" in refused(capsys, "swap", old, tmp_path / "new.mar")


def encrypt(path: Path) -> None:
    """As far as its entries' flags say."""
    raw = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):  # the table of contents, and each entry's own head
        at = 0
        while (at := raw.find(mark, at)) >= 0:
            raw[at + flags] |= 1
            at += 4
    path.write_bytes(raw)


def test_a_zip_inside_that_is_encrypted_or_broken_is_refused_by_swap_and_by_the_worker(stock, model, tmp_path, capsys):
    packed = tmp_path / "packed"
    packed.mkdir()
    inner = Path(shutil.make_archive(str(packed / "model"), "zip", model))
    encrypt(inner)
    assert "model.zip inside is encrypted" in refused(capsys, "swap", stock(packed), tmp_path / "new.mar")
    with pytest.raises(ConfigError, match=r"model\.zip.*encrypted"):
        _source(packed, Settings(model="model.zip"))
    inner.write_bytes(b"PK no more")
    (tmp_path / "old.mar").unlink()
    assert "can't be read" in refused(capsys, "swap", stock(packed), tmp_path / "new.mar")
    with pytest.raises(ConfigError, match="can't be unpacked"):
        _source(packed, Settings(model="model.zip"))
    assert [path.name for path in packed.iterdir()] == ["model.zip"]


def test_a_zip_inside_is_never_read_whole(stock, model, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    packed.mkdir()
    shutil.make_archive(str(packed / "model"), "zip", model)
    old, new = stock(packed), tmp_path / "new.mar"
    read = zipfile.ZipExtFile.read
    most = 0

    def noted(self: Any, n: int | None = -1) -> bytes:
        nonlocal most
        found = read(self, n)
        if self.name == "model.zip" and (n is None or n < 0):
            most = max(most, len(found))
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "read", noted)
    assert swap(old, new) == 0
    assert 0 < most < (packed / "model.zip").stat().st_size / 4  # its table of contents, from the end


def test_a_model_may_be_a_folder_of_the_machine_that_serves(model, tmp_path):
    assert _source(tmp_path / "unpacked", Settings(model=str(model))) == str(model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickles"):
        _source(tmp_path / "unpacked", Settings(model=str(model)))


@pytest.mark.parametrize(("allow_pickle", "safe"), [(False, True), (True, None)])
def test_pickles_of_a_hub_id_are_read_only_if_allowed(monkeypatch, tmp_path, allow_pickle, safe):
    asked: dict[str, Any] = {}

    def from_pretrained(source: str, **options: Any) -> Any:
        asked.update(options, source=source)
        raise OSError("no such model")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    settings = Settings(model="some/model", trust_remote_code=True, allow_pickle=allow_pickle)
    with pytest.raises(OSError, match="no such model"):
        open_engine(tmp_path, None, settings, [])
    assert (asked["source"], asked["use_safetensors"]) == ("some/model", safe)
    asked.clear()
    with pytest.raises(ConfigError, match="no such model"):
        open_engine(tmp_path, None, Settings(model="some/model"), [])
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
            open_engine(tmp_path, gpu_id, Settings(model="some/model", device=device, dtype="bfloat16"), [])
    assert [place for place, _ in asked] == [None, "cuda:0", "cuda:3", None, "cuda:1", "auto"]
    assert {dtype for _, dtype in asked} == {torch.bfloat16}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"parallelType: custom .*tensor_parallel_size"):
        open_engine(tmp_path, 0, Settings(model="some/model"), [])


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


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "org/model", ""])
def test_a_model_whose_name_would_leave_the_store_is_not_served(tmp_path, name):
    folder = tmp_path / "odd"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"modelName": name}}))
    with pytest.raises(ConfigError, match="make a name"):
        _model_name(folder)


def add_entry(path: Path, name: str, content: bytes = b"x", attributes: int = 0o100644) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = attributes << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, content)


def with_a_file_outside(path: Path) -> None:
    add_entry(path, "../../outside")


def with_a_file_at_the_root(path: Path) -> None:
    add_entry(path, "/etc/outside")


def with_a_file_outside_on_windows(path: Path) -> None:
    add_entry(path, "..\\outside")


def with_a_link(path: Path) -> None:
    add_entry(path, "tokenizer.model", b"/etc/passwd", 0o120777)


def with_a_name_twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        add_entry(path, "config.json", b"{}")


def with_too_many_entries(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(20_000):
            archive.writestr(f"f{number}", b"")


def with_a_bomb(path: Path) -> None:
    add_entry(path, "zeros", bytes(100 << 20))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (with_a_file_outside, "written outside its folder"),
        (with_a_file_at_the_root, "written outside its folder"),
        (with_a_file_outside_on_windows, "written outside its folder"),
        (with_a_link, "holds a link"),
        (with_a_name_twice, "twice"),
        (with_too_many_entries, "20000 is the most"),
        (with_a_bomb, "may be made to fill a disk"),
    ],
)
def test_an_archive_that_would_do_harm_when_unpacked_is_refused_by_swap_by_serve_and_inside(
    stock, model, tmp_path, capsys, spoil, told
):
    packed = tmp_path / "packed"
    packed.mkdir()
    inner = Path(shutil.make_archive(str(packed / "model"), "zip", model))
    spoil(inner)
    old, new = stock(packed), tmp_path / "new.mar"
    assert told in refused(capsys, "swap", old, new)
    with pytest.raises(ConfigError, match=told):
        _source(packed, Settings(model="model.zip"))
    assert [path.name for path in packed.iterdir()] == ["model.zip"]
    old.unlink()
    old = stock(model)
    spoil(old)
    assert told in refused(capsys, "swap", old, new)
    with pytest.raises(ConfigError, match=told):
        _model_name(old)
    assert not new.exists()


def test_a_configuration_too_long_to_read_is_refused(stock, model, tmp_path, capsys):
    (model / "config.json").write_bytes(b" " * (17 << 20))
    assert "for a file of its kind" in refused(capsys, "swap", stock(model), tmp_path / "new.mar")


def test_an_archive_that_unpacks_to_more_than_the_disk_has_is_refused_by_the_worker(model, tmp_path, monkeypatch):
    shutil.make_archive(str(tmp_path / "model"), "zip", model)
    shutil.move(model, tmp_path / "elsewhere")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match="has room for 1000; make room"):
        _source(tmp_path, Settings(model="model.zip"))


def test_a_folder_with_a_link_that_leads_out_of_it_is_refused(stock, model, tmp_path, capsys):
    folder = stock(model, archive_format="no-archive")
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    assert "is a link to" in refused(capsys, "swap", folder, tmp_path / "new.mar")


@pytest.mark.parametrize("section", ["7", "[1, 2]", "text"])
def test_a_section_that_holds_no_keys_is_refused(stock, model, tmp_path, capsys, section):
    old = stock(model, f"paged: {section}\n")
    assert "must hold keys and values" in refused(capsys, "swap", old, tmp_path / "new.mar")

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

import tiny_folder
from paged_core import ConfigError, EngineConfig
from paged_core.cli import main
from paged_torchserve.devices import choose_devices
from paged_torchserve.models import find_model
from paged_torchserve.opening import _source, open_engines
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
        "paged": {"replicas": 4, "max_new_tokens": 50, "kv_cache_bytes": 1000000},
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
    assert config["paged"] == {"replicas": 4, "max_new_tokens": 50, "max_num_seqs": 7, "seed": 3}


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
        open_engines(tmp_path, ["cpu"], settings, [[]])
    assert (asked["source"], asked["use_safetensors"]) == ("some/model", safe)
    asked.clear()
    with pytest.raises(ConfigError, match="no such model"):
        open_engines(tmp_path, ["cpu"], Settings(model="some/model"), [[]])
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
            settings = Settings(model="some/model", device=device, dtype="bfloat16")
            open_engines(tmp_path, choose_devices(gpu_id, [gpu_id or 0], settings), settings, [[]])
    assert [place for place, _ in asked] == [None, "cuda:0", "cuda:3", None, "cuda:1", "auto"]
    assert {dtype for _, dtype in asked} == {torch.bfloat16}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"parallelType: custom .*tensor_parallel_size"):
        open_engines(tmp_path, ["cuda:0"], Settings(model="some/model"), [[]])


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


# ---- what the old configuration says ---------------------------------------------------------------------------


def section(archive: Path) -> Any:
    return contents(archive)[2].get("paged", {})


def test_what_the_old_configuration_says_of_generation_goes_on_and_the_rest_is_listed(stock, model, tmp_path, capsys):
    old = stock(model, """
handler:
  model_path: model
  max_length: 80
  return_full_text: false
  temperature: 0.7
  top_k: 40
  do_sample: true
  repetition_penalty: 1.1
  torch_dtype: float16
  manual_seed: 40
  fast_kernels: true
""")  # fmt: skip
    assert swap(old, tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar") == {
        "return_full_text": False, "dtype": "float16",
        "defaults": {"max_length": 80, "temperature": 0.7, "top_k": 40, "do_sample": True, "repetition_penalty": 1.1},
    }  # fmt: skip
    told = capsys.readouterr().out
    for line in ("paged.return_full_text: False", "paged.defaults.top_k: 40",
                 "without a meaning here: handler.manual_seed: 40", "without a meaning here: handler.fast_kernels: True"):  # noqa: E501  # fmt: skip
        assert line in told, line


def test_setup_config_json_is_read_too(stock, model, tmp_path, capsys):
    (model / "setup_config.json").write_text('{"max_length": "150", "do_lower_case": true, "model_name": "gpt2"}')
    assert swap(stock(model, "{}"), tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar") == {"defaults": {"max_length": 150}}
    told = capsys.readouterr().out
    assert "without a meaning here: setup_config.json.do_lower_case: True" in told
    assert "model_name" not in told


def test_greedy_stays_greedy_and_max_new_tokens_counts_before_max_length(stock, model, tmp_path, capsys):
    config = "handler: {do_sample: false, temperature: 0.9, top_p: 0.5, max_new_tokens: 7, max_length: 50}"
    assert swap(stock(model, config), tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar") == {"max_new_tokens": 7}
    told = capsys.readouterr().out
    for name in ("temperature: 0.9", "top_p: 0.5", "max_length: 50"):
        assert f"without a meaning here: handler.{name}" in told


HANDLERS = {  # as much of pytorch/serve's examples as tells them apart
    "large_models/deepspeed": "from ts.handler_utils.distributed.deepspeed import get_ds_engine\nx.batch_decode(y)\n",
    "Huggingface_Transformers": 'mode == "text_generation"\nsetup_config["max_length"]\n',
    "large_models/Huggingface_accelerate": "from transformers import BloomForCausalLM\nself.setup_config\n",
    "large_models/Huggingface_accelerate/llama": "class LlamaHandler(BaseHandler):\n  batch_decode\n",
    "large_models/tp_llama": "from llama2 import Llama\nself.context.stopping_criteria = []\n",
    "large_models/mixtral_moe": "TextIteratorStreamerBatch(tokenizer)\n",
}
SAMPLED = {"do_sample": True, "top_p": 0.95, "top_k": 60}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("large_models/deepspeed", {"reply": "list", "defaults": {"max_length": 50}}),
        ("Huggingface_Transformers", {"defaults": {**SAMPLED, "max_length": 50}}),
        ("large_models/Huggingface_accelerate", {"defaults": SAMPLED, "max_new_tokens": 50}),
        ("large_models/Huggingface_accelerate/llama", {"defaults": {"max_length": 10}}),
        ("large_models/tp_llama", {"reply": "json", "return_full_text": False, "max_new_tokens": 10}),
        ("large_models/mixtral_moe", {"defaults": {"stream": True}, "max_new_tokens": 10}),
    ],
)
def test_what_clients_of_an_example_handler_got_they_get_again(model, tmp_path, capsys, name, expected):
    old = tmp_path / "old"
    shutil.copytree(model, old)
    (old / "MAR-INF").mkdir()
    manifest = {"model": {"modelName": "old", "modelVersion": "1.0", "handler": "h.py", "configFile": "c.yaml"}}
    (old / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (old / "h.py").write_text(HANDLERS[name])
    (old / "c.yaml").write_text("handler: {max_new_tokens: 10, max_length: 50}")
    assert swap(old, tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar") == expected
    assert f"examples/{name}" in capsys.readouterr().out


VLLM = """
minWorkers: 1
maxWorkers: 1
asyncCommunication: true
handler:
  model_path: model/snapshots/abc
  vllm_engine_config:
    max_num_seqs: 16
    max_model_len: 250
    served_model_name: [meta-llama/Llama, llama3-8b]
    tensor_parallel_size: 4
    swap_space: 16
"""


def test_vllms_example_keeps_its_names_and_limits(stock, model, tmp_path, capsys):
    outer = tmp_path / "outer"
    for name in ("abc", "other"):
        shutil.copytree(model, outer / "model" / "snapshots" / name)
    assert swap(stock(outer, VLLM), tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar") == {
        "replicas": 1, "max_num_seqs": 16, "max_model_len": 250, "tensor_parallel_size": 4,
        "model": "model/snapshots/abc", "served_model_name": ["meta-llama/Llama", "llama3-8b"],
    }  # fmt: skip
    assert "vllm_engine_config.swap_space: 16" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["  adapters:\n    one: adapters/one\n", "    enable_lora: true\n"])
def test_adapters_are_refused_unless_the_model_is_to_be_served_without_them(stock, model, tmp_path, capsys, asked):
    (model.parent / "outer").mkdir()
    shutil.move(model, model.parent / "outer" / "model")
    old = stock(model.parent / "outer", VLLM.replace("model/snapshots/abc", "model") + asked)
    told = refused(capsys, "swap", old, tmp_path / "new.mar")
    assert "adapters (LoRA)" in told and "--set adapters=none" in told
    assert swap(old, tmp_path / "new.mar", "--set", "adapters=none") == 0
    assert f"without a meaning here: handler.{asked.partition(':')[0].strip()}" in capsys.readouterr().out.replace(
        "vllm_engine_config.", "")  # fmt: skip
    config = contents(tmp_path / "new.mar")[2]
    assert read_settings(config).adapters == "none", "the worker takes it as the swap did"
    del config["paged"]["adapters"]
    with pytest.raises(ConfigError, match="adapters=none"):
        read_settings(config)  # as the worker does of an archive that was not swapped
    assert "adapters" in refused(capsys, "swap", old, tmp_path / "other.mar", "--set", "adapters=all")


def test_a_model_with_an_adapter_beside_it_is_refused_by_swap_and_worker(stock, model, tmp_path, capsys):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge_and_unload" in refused(capsys, "swap", stock(model), tmp_path / "new.mar")
    assert "merge_and_unload" in refused(capsys, "archive", model, tmp_path / "new.mar")
    with pytest.raises(ConfigError, match="merge_and_unload"):
        open_engines(model, ["cpu"], read_settings({}), [[]])
    (model / "config.json").unlink()
    assert "merge_and_unload" in refused(capsys, "archive", model, tmp_path / "new.mar")


# ---- where the model is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/srv/models/llama", "meta-llama/Llama-2-7b"])
def test_a_model_outside_of_the_archive_is_the_one_that_the_old_handler_named(stock, tmp_path, path):
    (tmp_path / "notes.txt").write_text("x")
    assert swap(stock(tmp_path / "notes.txt", f"handler: {{model_path: {path}}}"), tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar")["model"] == path


def test_a_gguf_file_is_found_and_an_archive_of_one_can_be_swapped(stock, tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert swap(stock(tmp_path / "m.gguf", "{}"), tmp_path / "new.mar") == 0
    assert section(tmp_path / "new.mar")["model"] == "m.gguf"
    assert swap(tmp_path / "new.mar", tmp_path / "again.mar") == 0
    assert section(tmp_path / "again.mar")["model"] == "m.gguf"


def test_a_model_without_a_tokenizer_is_refused_unless_one_is_named(stock, model, tmp_path, capsys):
    (model / "tokenizer.json").unlink()
    old = stock(model)
    assert "--set tokenizer=" in refused(capsys, "swap", old, tmp_path / "new.mar")
    assert "--set tokenizer=" in refused(capsys, "archive", model, tmp_path / "new.mar")
    assert swap(old, tmp_path / "new.mar", "--set", "tokenizer=some/where") == 0
    assert section(tmp_path / "new.mar")["tokenizer"] == "some/where"


def test_a_model_is_opened_with_the_tokenizer_named_and_not_without_any(tmp_path):
    folder = tiny_folder.save(tmp_path / "inside" / "model")
    (tmp_path / "inside" / "words").mkdir()
    for file in list(folder.glob("*token*")) + list(folder.glob("chat_template*")):
        file.rename(tmp_path / "inside" / "words" / file.name)
    small = EngineConfig(num_blocks=8, attention_backend="reference")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        open_engines(tmp_path / "inside", ["cpu"], Settings(model="model", engine=small), [[]])
    named = Settings(model="model", tokenizer="words", engine=small)
    (engine,) = open_engines(tmp_path / "inside", ["cpu"], named, [[]])
    with engine:
        assert engine.codec.encode("Hello") == tiny_folder.byte_tokenizer().encode("Hello")
    with pytest.raises(ConfigError, match=r"tokenizer .*nowhere can't be loaded"):
        open_engines(tmp_path / "inside", ["cpu"], Settings(model="model", tokenizer=str(tmp_path / "nowhere")), [[]])


def test_encoder_decoder_models_are_refused_by_the_swap(stock, model, tmp_path, capsys):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (model / "config.json").write_text(json.dumps(config))
    told = refused(capsys, "swap", stock(model), tmp_path / "new.mar")
    assert "T5ForConditionalGeneration" in told and "encoder" in told


# ---- links and folders -----------------------------------------------------------------------------------------


def hub_cache(model: Path, place: Path) -> Path:
    """As a hub's cache keeps a model: files under blobs, links to them under snapshots."""
    snapshot, blobs = place / "snapshots" / "abc", place / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_of_a_hubs_cache_each_file_is_packed_once(model, tmp_path):
    folder = tmp_path / "old"
    hub_cache(model, folder / "model")
    (folder / "MAR-INF").mkdir()
    manifest = {"model": {"modelName": "old", "modelVersion": "1.0", "handler": "x"}}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    assert swap(folder, tmp_path / "new.mar") == 0
    files, _, config = contents(tmp_path / "new.mar")
    assert config["paged"]["model"] == "model/snapshots/abc"
    assert [name for name in files if "blobs" in name] == []
    assert (tmp_path / "new.mar").stat().st_size < 1.1 * len(WEIGHTS)


def test_linked_folders_are_followed_inside_and_outside_if_that_is_said(model, tmp_path, capsys):
    folder = tmp_path / "old"
    (folder / "MAR-INF").mkdir(parents=True)
    manifest = {"model": {"modelName": "old", "modelVersion": "1.0", "handler": "x"}}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (folder / "linked").symlink_to(model, target_is_directory=True)
    assert "--follow-links" in refused(capsys, "swap", folder, tmp_path / "new.mar")
    assert swap(folder, tmp_path / "new.mar", "--follow-links") == 0
    files, _, config = contents(tmp_path / "new.mar")
    assert (files["linked/model.safetensors"], config["paged"]["model"]) == (WEIGHTS, "linked")


@pytest.mark.parametrize("archive_format", ["default", "no-archive"])
def test_a_folder_can_be_written_that_shares_large_files_with_the_old_one(
    stock, model, tmp_path, archive_format, capsys
):
    old, new = stock(model, archive_format=archive_format), tmp_path / "new"
    assert swap(old, new, "--archive-format", "no-archive") == 0
    manifest = json.loads((new / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "paged_torchserve.handler"
    assert (new / "model.safetensors").read_bytes() == WEIGHTS
    if old.is_dir():
        assert (new / "model.safetensors").samefile(old / "model.safetensors")
        assert json.loads((old / "MAR-INF" / "MANIFEST.json").read_text())["model"]["handler"] == "their_handler.py"
    assert _model_name(new)[0] == "old"
    assert "--force" in refused(capsys, "swap", old, new, "--archive-format", "no-archive")
    assert swap(old, new, "--archive-format", "no-archive", "--force") == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    assert "no archive's folder" in refused(capsys, "swap", old, precious, "--archive-format", "no-archive", "--force")
    assert "--archive-format no-archive" in refused(capsys, "archive", model, tmp_path / "folder")

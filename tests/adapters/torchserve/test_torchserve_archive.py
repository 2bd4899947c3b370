"""Archives of TorchServe's: ours made from another's, or from a model's folder."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from paged_core.cli import main
from paged_torchserve.opening import _source
from paged_torchserve.server import _model_name
from paged_torchserve.settings import SectionSettings, read_settings
from torchserve_archives import STOCK_CONFIG, WEIGHTS, contents, refused, swap


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
    assert _source(tmp_path, SectionSettings(model="some/model")) == "some/model"
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert main(["torchserve", "archive", str(tmp_path / "m.gguf"), str(tmp_path / "gguf.mar")]) == 0
    assert contents(tmp_path / "gguf.mar")[2]["paged"] == {"model": "m.gguf"}
    assert _source(tmp_path, SectionSettings(model="m.gguf")) == str(tmp_path / "m.gguf")


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

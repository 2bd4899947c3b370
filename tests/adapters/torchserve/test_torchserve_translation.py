"""What an old configuration says goes on in our words, and where the model is."""

from __future__ import annotations

import json
import shutil

import pytest

import tiny_folder
from paged_core import ConfigError, EngineConfig
from paged_torchserve.opening import open_engines
from paged_torchserve.settings import SectionSettings, read_settings
from torchserve_archives import contents, refused, section, swap


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
    "large_models/trt_llm": "from tensorrt_llm.runtime import ModelRunner\nclass TRTLLMHandler(BaseHandler):\n",
    "large_models/deepspeed_mii": "class DeepSpeedMIIHandler(BaseHandler, ABC):\n  self.max_new_tokens\n",
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
        ("large_models/trt_llm", {"reply": "json", "return_full_text": False, "max_new_tokens": 10}),
        ("large_models/deepspeed_mii", {"return_full_text": False, "max_new_tokens": 10}),
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
        open_engines(tmp_path / "inside", ["cpu"], SectionSettings(model="model", engine=small), [[]])
    named = SectionSettings(model="model", tokenizer="words", engine=small)
    (engine,) = open_engines(tmp_path / "inside", ["cpu"], named, [[]])
    with engine:
        assert engine.codec.encode("Hello") == tiny_folder.byte_tokenizer().encode("Hello")
    with pytest.raises(ConfigError, match=r"tokenizer .*nowhere can't be loaded"):
        open_engines(
            tmp_path / "inside", ["cpu"], SectionSettings(model="model", tokenizer=str(tmp_path / "nowhere")), [[]]
        )


def test_encoder_decoder_models_are_refused_by_the_swap(stock, model, tmp_path, capsys):
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (model / "config.json").write_text(json.dumps(config))
    told = refused(capsys, "swap", stock(model), tmp_path / "new.mar")
    assert "T5ForConditionalGeneration" in told and "encoder" in told

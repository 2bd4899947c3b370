"""A worker's engines: their devices, their settings, and their metrics as TorchServe is told them."""

from __future__ import annotations

import pytest

from paged_core import ConfigError, EngineConfig
from paged_torchserve import metrics
from paged_torchserve.devices import choose_devices
from paged_torchserve.settings import read_settings
from torchserve_worker import slow


def test_metrics_are_told_together_and_not_once_a_token(worker):
    serving = worker(max_new_tokens=50)
    serving.watch.close()
    serving.ask({"body": '!"#'})
    serving.tell_metrics()
    told = serving.cache.told
    assert told["paged_generation_tokens_total"] == 50
    assert told["paged_prompt_tokens_total"] == 3
    assert told["paged_requests_running"] == 0
    assert told["paged_time_to_first_token_seconds_count"] == 1
    assert told["paged_inter_token_latency_seconds_count"] == 49
    assert told["paged_inter_token_latency_seconds_sum"] > 0
    assert serving.cache.num_updates < 3 * len(metrics.NAMES)
    before = serving.cache.num_updates
    serving.tell_metrics()
    assert serving.cache.num_updates == before


def test_several_engines_share_the_requests_and_their_metrics_are_added_up(worker):
    serving = worker(slow(0.02), replicas=2, device="cpu", max_new_tokens=20)
    serving.watch.close()
    names = [chr(ord("A") + number) for number in range(6)]
    for name in names:
        serving.post(name, {"body": name})
    for _ in range(3):
        serving.step()
    assert [serving.num_open(engine) for engine in serving.engines] == [3, 3]
    serving.run()
    assert [serving.replies[name].text for name in names] == [
        "".join(chr(ord(name) + k) for k in range(21)) for name in names
    ]
    serving.tell_metrics()
    assert serving.cache.told["paged_generation_tokens_total"] == 120
    assert serving.cache.told["paged_requests_succeeded_total"] == 6


@pytest.mark.parametrize(
    ("gpu_id", "gpu_ids", "settings", "devices"),
    [
        (None, [], {}, ["cpu"]),
        (None, [], {"replicas": 4}, ["cpu"]),
        (0, [0], {}, ["cuda:0"]),
        (1, [0, 1, 2, 3], {"replicas": 1}, ["cuda:1"]),
        (1, [0, 1, 2, 3], {"replicas": 4}, ["cuda:1", "cuda:2", "cuda:3", "cuda:0"]),
        (0, [0, 1], {"replicas": 8}, ["cuda:0", "cuda:1"]),
        (2, [2, 3], {"device": "cuda:3"}, ["cuda:3"]),
        (2, [2, 3], {"device": "auto"}, ["auto"]),
        (None, [], {"device": "cpu", "replicas": 2}, ["cpu", "cpu"]),
        (0, [0, 1], {"tensor_parallel_size": 2}, ["auto"]),
    ],
)
def test_each_engine_has_a_gpu_of_its_own(gpu_id, gpu_ids, settings, devices):
    assert choose_devices(gpu_id, gpu_ids, read_settings({"paged": settings})) == devices


def test_a_host_of_several_gpus_is_not_taken_for_one_without_a_word():
    with pytest.raises(ConfigError, match=r"there are 4.*replicas=4 for all.*replicas=1 for this one"):
        choose_devices(2, range(4), read_settings({}))
    with pytest.raises(ConfigError, match="leave device out"):
        choose_devices(2, range(4), read_settings({"paged": {"device": "cuda:1", "replicas": 2}}))


def test_settings_of_an_engine_are_checked_by_name_and_type():
    assert read_settings({"paged": {"max_num_seqs": 4, "watermark": 0}}).engine == EngineConfig(
        max_num_seqs=4, watermark=0.0
    )
    nan = float("nan")
    wrong = [{"max_num_seq": 4}, {"max_num_seqs": "4"}, {"dtype": 16}, [1], {"num_blocks": 0}]
    wrong += [{"max_reply_bytes": 0}, {"heartbeat_s": 0}, {"heartbeat_s": nan}, {"max_new_tokens": 0}]
    for section in wrong:
        with pytest.raises(ConfigError):
            read_settings({"paged": section})

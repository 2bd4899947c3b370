"""A server that is killed while it streams: every client is told, and the next server takes the port."""

import argparse
import importlib.util

from places import ROOT
from tiny_folder import save


def test_clients_of_a_killed_server_see_an_error_and_never_a_shorter_answer(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_reliability", ROOT / "benchmarks" / "bench_reliability.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    model = save(tmp_path / "model")
    told = bench.measure_kill(argparse.Namespace(model=str(model), clients=4))
    assert set(told["ends"]) <= {"IncompleteRead", "ConnectionResetError"}
    assert told["events_before"] > 0
    assert told["its_stream_ends_with"] == "[DONE]"
